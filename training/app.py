r"""
The page of hf_pixelcnn: draw, complete, score and look inside, in a browser.

    python training/app.py --open    # `make app`
    python app.py                    # in a Space

The models are those in the folder `models` beside this file, as in a Space, or else those in `model_cards`.
"""

import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main():
    with tempfile.TemporaryDirectory(prefix="hf_pixelcnn-") as scratch:
        os.environ["GRADIO_TEMP_DIR"] = scratch  # uploads, until they are read
        os.environ.setdefault("MPLCONFIGDIR", scratch)  # where Gradio finds Matplotlib, that writes a list of fonts
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from transformers.utils import logging

        from hf_pixelcnn.app.page import build_page, launch_page

        logging.disable_progress_bar()
        models = HERE / "models" if (HERE / "models").is_dir() else HERE.parent / "model_cards"
        page = build_page(sorted(config.parent for config in models.glob("*/config.json")))
        launch_page(page, inbrowser="--open" in sys.argv[1:])


if __name__ == "__main__":
    main()
