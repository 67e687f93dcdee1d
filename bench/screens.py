"""Pictures of the page of `vgrout report`: python bench/screens.py RUNS... --out FOLDER.

Builds the page of runs or records and takes PNGs of its parts: the top with the verdict, the arms, the plane, the
explorer with a rollout open. Each as on a desktop, light and dark, and on a phone. Needs the extra `dev` and Debian's
packages chromium and chromium-driver.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from vgrout.lab.report import page
from vgrout.verify.browser import chromium, picture, shape, visit

LARGEST = 250_000  # bytes of a picture


@dataclass(frozen=True)
class Look:
    width: int  # CSS pixels
    scale: float  # pixels of the picture per CSS pixel
    phone: bool = False
    dark: bool = False


LOOKS = {
    "light": Look(1280, 1.0),
    "dark": Look(1280, 1.0, dark=True),
    "phone": Look(390, 1.5, phone=True),
}
PARTS = {  # first and last element, and the most CSS pixels of height
    "top": ("header", "header ~ .wide", 1000),
    "arms": ("#arms", "#arms + .wide", 1000),
    "plane": ("#plane", "#plane + figure", 900),
    "rollout": ("#rollouts", ".x-both", 1100),
}
OPENED = ("rollouts?verdict=hack&zone=route", "rollouts?verdict=hack", "rollouts?")  # of the first that finds one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="runs, records, or folders that hold some")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    args = parser.parse_args()
    html, figures, _ = page(args.runs)
    parts = {name: part for name, part in PARTS.items() if name != "plane" or figures[0].name == "plane"}
    args.out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder, chromium() as browser:
        file = Path(folder) / "report.html"
        file.write_text(html)
        for look_name, look in LOOKS.items():
            shape(browser, look.width, phone=look.phone, dark=look.dark)
            for address in OPENED:
                visit(browser, f"{file.as_uri()}#{address}")
                browser.find_element("tag name", "body").send_keys("j")
                if browser.find_elements("css selector", ".x-open"):
                    break
            for name, (first, last, most) in parts.items():
                png = picture(browser, first, last, most, scale=look.scale)
                out = args.out / f"report-{name}-{look_name}.png"
                if len(png) > LARGEST:
                    raise SystemExit(f"{out} would have {len(png)} bytes, more than {LARGEST}")
                out.write_bytes(png)
                print(f"{out}  {len(png) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
