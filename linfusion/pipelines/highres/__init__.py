"""Images of sizes that softmax attention and whole-picture memory do not reach."""
