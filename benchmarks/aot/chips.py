"""The GPUs that are compiled for, what is compiled for each, and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from linfusion.kernels.launch import Launch, Target

DTYPES = ("bfloat16", "float16", "float32")
# Columns of a head of linear attention. 576 is DiT-XL/2 with LiT's two heads.
HEAD_DIMS = (40, 64, 72, 80, 96, 128, 160, 576)
# Products of tensor cores that a kernel may execute for each that it needs.
MOST_PRODUCTS = 1.05


class Chip(NamedTuple):
    """A GPU to compile for.

    Attributes:
        warp: threads of a warp.
        shared: the most bytes of shared memory one program may ask for.
        launched: whether the library launches its kernels there. Elsewhere it runs the blocked
            form, because kernels spill; what the compiler says is reported and fails nothing.
    """

    vendor: str
    arch: int | str
    warp: int
    shared: int
    multiprocessors: int
    launched: bool = True


CHIPS = {
    "sm_80": Chip("cuda", 80, 32, 166_912, 108),
    "sm_86": Chip("cuda", 86, 32, 101_376, 82),
    "sm_89": Chip("cuda", 89, 32, 101_376, 128),
    "sm_90": Chip("cuda", 90, 32, 232_448, 132),
    "sm_100": Chip("cuda", 100, 32, 232_448, 148),
    "sm_120": Chip("cuda", 120, 32, 101_376, 170),
    "gfx942": Chip("hip", "gfx942", 64, 65_536, 304),
    "gfx1100": Chip("hip", "gfx1100", 32, 65_536, 96, launched=False),
    "gfx1201": Chip("hip", "gfx1201", 32, 65_536, 64, launched=False),
}


def target_of(chip: Chip, collected: list[Launch]) -> Target:
    """What the library's launchers take to collect their launches for a chip."""
    from linfusion.kernels.launch import Target

    arch = chip.arch if isinstance(chip.arch, int) else 80
    return Target(chip.vendor, chip.multiprocessors, collected.append, arch)


# chip; head size, or channels × features of the scan; dtype
Job = tuple[str, int | str, str]

QUICK: list[Job] = [
    ("sm_80", 40, "bfloat16"),
    ("sm_89", 160, "bfloat16"),
    ("sm_100", 64, "float16"),
    ("gfx942", 80, "float32"),
    ("sm_86", "64×64", "bfloat16"),
    ("sm_90", "64×128", "float32"),
    ("sm_120", "128×128", "bfloat16"),
]


def jobs(scans: tuple[str, ...]) -> list[Job]:
    """Everything there is to compile; `scans` names the sizes of the scan.

    Where nothing is launched two head sizes in one dtype show why.
    """
    found: list[Job] = []
    for name, chip in CHIPS.items():
        dtypes, sizes = (DTYPES, HEAD_DIMS) if chip.launched else (("bfloat16",), (64, 128))
        found += [(name, size, dtype) for dtype in dtypes for size in (*sizes, *scans)]
    return found


# What `Report.cells` fills in.
COLUMNS = (
    "| dtype | D | kernel | tile | registers | spills | shared | matrix instruction | products "
    "| loads: bytes × count |"
)
RULE = "| --- " * (COLUMNS.count("|") - 1) + "|"


@dataclass
class Report:
    """What the compiler made of one kernel.

    Attributes:
        d: columns of a head; of the scan, channels of a head × features of its state.
        products: products that the tensor cores execute for each that the kernel needs; 1 where
            there are none.
        loads: width in bytes of a global load -> how many such instructions.
        hbm: bytes moved if every re-read hits a cache: each tensor once.
        issued: bytes that the programs load and store, re-reads included.
        minimum: bytes of the tensors as long as the sequence, each once.
        narrow: loads of 2 bytes or less that may be, of what is shorter than the sequence.
    """

    chip: str
    dtype: str
    d: int | str
    kernel: str
    tile: str
    registers: int
    spills: int
    shared: int
    mma: str
    products: float
    loads: dict[int, int]
    hbm: int
    issued: int
    minimum: int
    narrow: int = 0

    def cells(self, kernel: str | None = None) -> str:
        """The start of this kernel's row in a table, under `COLUMNS`."""
        loads = ", ".join(f"{w} × {n}" for w, n in sorted(self.loads.items(), reverse=True))
        products = f"{self.products:.2f}" if self.mma else "–"
        return (
            f"| {self.dtype} | {self.d} | {kernel or self.kernel} | {self.tile} | {self.registers} "
            f"| {self.spills} | {self.shared} | {self.mma or '–'} | {products} | {loads} |"
        )

    def problems(self) -> list[str]:
        """What makes this kernel slow or impossible; empty if nothing does."""
        found = []
        if self.spills:
            found.append(f"{self.spills} spill instructions or bytes")
        if self.shared > CHIPS[self.chip].shared:
            limit = CHIPS[self.chip].shared
            found.append(f"{self.shared} bytes of shared memory, {self.chip} has {limit}")
        if self.products > MOST_PRODUCTS:
            found.append(
                f"{self.products:.2f} products executed for each needed, {MOST_PRODUCTS} may be"
            )
        narrow = sum(count for width, count in self.loads.items() if width <= 2)
        if narrow > self.narrow:
            found.append(f"{narrow} loads of 2 bytes or less")
        return [f"{self.chip} {self.dtype} D={self.d} {self.kernel}: {text}" for text in found]

    def failures(self) -> list[str]:
        """Why this kernel must not ship: its problems, where the library launches it."""
        return self.problems() if CHIPS[self.chip].launched else []
