// SVG to pixels: reads {"width": W, "svgs": [...]} from stdin, writes RGBA of W × H for each, one after the other, to stdout.
// A picture in which nothing is visible comes out as it is; whoever asked looks at it.
import { createRequire } from "node:module";
import { readFileSync, writeSync } from "node:fs";

const { Resvg } = createRequire(process.argv[2] + "/")("@resvg/resvg-js");
const { width, svgs } = JSON.parse(readFileSync(0, "utf8"));
for (const svg of svgs) {
  const pixels = new Resvg(svg, { fitTo: { mode: "width", value: width }, font: { loadSystemFonts: false } }).render().pixels;
  for (let sent = 0; sent < pixels.length; ) sent += writeSync(1, pixels, sent);
}
