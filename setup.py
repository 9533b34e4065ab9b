"""
The part of the metadata that depends on where the project lives: README.md as the page of a package index.

With `PROJECT_URL` in the environment (`https://HOST/OWNER/NAME`) the links and pictures of README.md, which are
relative to the project, lead to the files of the release there. Without it they stay as they are.
"""

import os
import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
RELATIVE = r"(?!https?://|#)"


def page(url: str | None) -> str:
    """README.md, with absolute links if the address of the project is known."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    if not url:
        return text
    (version,) = re.findall(r'__version__ = "(.+)"', (ROOT / "hf_pixelcnn" / "version.py").read_text())
    text = re.sub(rf"\]\({RELATIVE}", f"]({url}/blob/v{version}/", text)
    return re.sub(rf'src="{RELATIVE}', f'src="{url}/raw/v{version}/', text)


address = os.environ.get("PROJECT_URL", "").rstrip("/")
setup(
    long_description=page(address),
    long_description_content_type="text/markdown",
    project_urls={"Source": address} if address else {},
)
