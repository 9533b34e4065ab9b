r"""
A page to play with: draw, complete, score and look inside, in a browser.

Needs the extra `app`: `pip install "hf_pixelcnn[app]"`. `actions` is what the page does, without any of its looks;
`uploads` reads pictures of strangers; `pixel_canvas` is the picture one can paint on; `page` is the page.
`training/app.py` starts it.
"""
