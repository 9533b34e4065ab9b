"""The page: four tabs, and what their buttons do."""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from html import escape
from importlib.util import find_spec
from pathlib import Path

if find_spec("gradio") is None:
    raise ImportError("The page needs gradio: pip install 'hf_pixelcnn[app]'.")

import gradio as gr  # pyright: ignore[reportMissingImports]
from PIL import Image

from . import actions, html, uploads
from .actions import ANY, ShownModel
from .pixel_canvas import CanvasValue, digit, pixel_canvas

MAX_IMAGES = 36
MAX_SEED = 2**32 - 1
CHANNELS = ["red", "green", "blue"]
# All that computes shares one place in the queue: a second person sees how many are before.
ONE_AT_A_TIME = {"concurrency_id": "models", "concurrency_limit": 1}
INTRO = """# Pixel by pixel
These models draw a picture one pixel after the other and know the exact probability of every picture. Draw new ones,
complete one, see how likely it is and which pixels are surprising, and look at what a single prediction depends on."""


def plain_errors(handler: Callable) -> Callable:
    """Let the page show what was wrong with a request as one sentence."""

    def shown(error: Exception) -> gr.Error:
        return gr.Error(str(error), print_exception=False)

    @functools.wraps(handler)
    def answer(*args):
        try:
            return handler(*args)
        except (ValueError, TypeError) as error:
            raise shown(error) from None

    @functools.wraps(handler)
    def answers(*args):
        try:
            yield from handler(*args)
        except (ValueError, TypeError) as error:
            raise shown(error) from None

    return answers if inspect.isgeneratorfunction(handler) else answer


def checked_seed(seed: float | None) -> int:
    if seed is None or seed != int(seed) or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"The seed must be a whole number from 0 to {MAX_SEED}.")
    return int(seed)


def facts(shown: ShownModel) -> str:
    """One line about a model."""
    config = shown.config
    height, width = config.image_size
    parts = [
        f"{shown.model.num_parameters():,} parameters",
        f"{height} × {width} {'colour' if config.num_channels == 3 else 'grey'} pixels of {config.num_levels} levels",
        f"{config.num_classes} classes" if config.num_classes else "no classes",
    ]
    if shown.results:
        bits, split = shown.results["bits_per_dim"], shown.results["split"]
        parts.append(f"{bits:.4f} bits per dimension on {escape(split)} of {escape(shown.results['dataset'])}")
    return html.message("; ".join(parts) + ".")


class Handlers:
    r"""
    What the page answers. Every method takes the values of components and returns those of others.

    Args:
        models (`dict[str, ShownModel]`): By name.
    """

    def __init__(self, models: dict[str, ShownModel]):
        self.models = models

    def read(self, name: str, payload: object) -> tuple[ShownModel, CanvasValue]:
        """The chosen model, and the picture on a canvas."""
        shown = self.models[name]
        height, width = shown.config.image_size
        return shown, CanvasValue.from_payload(payload, height, width, shown.config.num_channels)

    def fitted(self, shown: ShownModel, picture: Image.Image) -> tuple[CanvasValue, list[str]]:
        """Any picture as the model sees it, and what was done to it."""
        height, width = shown.config.image_size
        is_of_its_size = picture.size == (width, height)
        picture, done = uploads.fit(picture, height, width, shown.config.num_channels)
        if shown.config.num_levels == 2:
            # A picture of the model's size is likely one of its data set, which it was trained to see its own way.
            is_one_of_its = is_of_its_size and shown.processor.binarization == "threshold"
            threshold = shown.processor.threshold if is_one_of_its else 127
            picture = picture.point([255 * (pixel > threshold) for pixel in range(256)])
            done.append(f"pixels above {threshold} of 255 became light, the others dark")
        return CanvasValue.of(shown.picture_of(shown.levels_of(picture))), done

    def choose_model(self, name: str, payload: object) -> list:
        """Everything that depends on the model; the picture on the canvas is fitted to the new one."""
        shown = self.models[name]
        picture = digit(3)
        for height, width in {tuple(other.config.image_size) for other in self.models.values()}:
            try:
                picture = CanvasValue.from_payload(payload, height, width, num_channels=3).picture
            except ValueError:
                continue
        value = self.fitted(shown, picture)[0].payload()
        return [
            facts(shown),
            gr.update(choices=[ANY, *shown.class_names], value=ANY, visible=bool(shown.class_names)),
            gr.update(visible=shown.is_guided, value=1),
            gr.update(visible=shown.config.num_channels == 3, value=CHANNELS[0]),
            *[value] * 3,
            *[""] * 3,
        ]

    def draw(
        self,
        name: str,
        class_name: str,
        seed: float,
        num_images: int,
        temperature: float,
        top_p: float,
        guidance: float,
    ) -> Iterator[tuple[str, str]]:
        shown, seed, num_images = self.models[name], checked_seed(seed), int(num_images)
        settings = {"temperature": temperature, "top_p": top_p}
        if shown.is_guided and guidance != 1:
            settings["guidance_scale"] = guidance
        status = html.message("Drawing.")
        for drawn in actions.draw(shown, class_name, num_images, seed, **settings):
            if drawn.animation is not None:
                status = html.message(
                    f"{num_images} image{'s' * (num_images > 1)} in {drawn.seconds:.1f} s. The same seed gives the "
                    "same picture, as long as model and settings are the same."
                )
            yield html.drawing(shown, drawn, num_images, seed), status
            status = gr.skip()  # a row that is on its way must not write over "Stopped."

    def complete(
        self, name: str, class_name: str, payload: object, num_images: int, num_candidates: int, seed: float
    ) -> Iterator[tuple[str, str]]:
        (shown, value), seed = self.read(name, payload), checked_seed(seed)
        num_images, num_candidates, known = int(num_images), int(num_candidates), ~value.hidden
        if known.all():
            raise ValueError("Nothing is brushed out, so there is nothing to draw: brush out a part of the picture.")
        levels = shown.levels_of(value.picture)
        class_id = actions.class_or_guess(shown, class_name, levels)
        sentences = [] if class_id is None else [f"Drawn as class {shown.class_names[class_id]}."]
        if num_candidates > 1:
            sentences.append(
                f"Below each completion: how many equally good ones the {num_candidates} candidates were worth "
                "(effective sample size)."
            )
        elif not actions.is_exact(known):
            sentences.append("What is kept to the right or below was not heeded: more candidates make it fit.")
        pictures = shown.picture_of(levels), actions.with_kept_pixels(shown, levels, known)
        status = html.message("Drawing.", *sentences)
        for drawn in actions.complete(shown, levels, known, class_id, num_images, num_candidates, seed):
            if drawn.is_done:
                status = html.message(f"Done, {drawn.seconds:.1f} s.", *sentences)
            yield html.completions(*pictures, drawn, num_candidates), status
            status = gr.skip()

    def score(self, name: str, class_name: str, payload: object) -> str:
        shown, value = self.read(name, payload)
        levels = shown.levels_of(value.picture)
        return html.score(shown, shown.picture_of(levels), actions.score(shown, levels, class_name))

    def look(self, name: str, class_name: str, payload: object, channel: str) -> str:
        shown, value = self.read(name, payload)
        levels, is_colour = shown.levels_of(value.picture), shown.config.num_channels == 3
        channel_id = CHANNELS.index(channel) if is_colour else 0
        found = actions.look_inside(shown, levels, value.row, value.column, channel_id, class_name)
        picture = shown.picture_of(levels)
        return html.look(shown, picture, found, value.row, value.column, channel if is_colour else "")

    def pick(self, name: str, event: gr.EventData) -> list:
        index = event.index
        if not (isinstance(index, int) and 0 <= index < 10):
            raise ValueError("There is no such picture.")
        value, _ = self.fitted(self.models[name], digit(index))
        return [value.payload()] * 3 + [html.message(f"A test digit of MNIST, class {index}.")] * 3

    def upload(self, name: str, path: str) -> list:
        try:
            picture, done = uploads.read_picture(path)
        finally:
            Path(path).unlink(missing_ok=True)
        value, more = self.fitted(self.models[name], picture)
        done += more
        text = f"Your picture was fitted: {'; '.join(done)}." if done else "Your picture is shown as it is."
        return [value.payload()] * 3 + [html.message(text)] * 3

    def draw_one(self, name: str, class_name: str, seed: float) -> list:
        shown, seed = self.models[name], checked_seed(seed)
        for drawn in actions.draw(shown, class_name, 1, seed):
            levels = drawn.picture.resize(shown.config.image_size[::-1], Image.Resampling.NEAREST)
        value, _ = self.fitted(shown, levels)
        return [value.payload()] * 3 + [html.message(f"Drawn by the model, seed {seed}.")] * 3


def picture_panel(mode: str, value: CanvasValue) -> tuple[gr.HTML, gr.UploadButton, gr.Button, gr.HTML]:
    """A canvas, and what fills it."""
    canvas = pixel_canvas(mode, value, elem_id=f"canvas-{mode}")
    with gr.Row():
        megabytes = uploads.MAX_BYTES // 2**20
        # Of any type: what a name says counts for nothing, and Gradio would log each other one with its stack.
        upload = gr.UploadButton(f"Upload a picture (up to {megabytes} MB)", size="sm", elem_id=f"upload-{mode}")
        draw_one = gr.Button("Let the model draw one", size="sm", elem_id=f"draw-one-{mode}")
    return canvas, upload, draw_one, gr.HTML(elem_id=f"note-{mode}")


def seed_field(name: str) -> gr.Number:
    info = "The same seed gives the same picture."
    return gr.Number(0, label="Seed", info=info, precision=0, min_width=200, elem_id=f"seed-{name}")


def start_and_stop(label: str, name: str) -> tuple[gr.Button, gr.Button]:
    with gr.Row():
        start = gr.Button(label, variant="primary", min_width=80, elem_id=f"start-{name}")
        stop = gr.Button("Stop", variant="stop", min_width=80, elem_id=f"stop-{name}")
    return start, stop


def draw_on_click(
    buttons: tuple[gr.Button, gr.Button], draw: Callable, inputs: list, pictures: gr.HTML, status: gr.HTML
):
    """The first button starts to draw pictures, the second stops it."""
    start, stop = buttons
    event = start.click(plain_errors(draw), inputs, [pictures, status], show_progress_on=pictures, **ONE_AT_A_TIME)
    stop.click(lambda: html.message("Stopped."), None, status, cancels=[event], queue=False)


def draw_tab(handlers: Handlers, model: gr.Dropdown, class_name: gr.Dropdown) -> gr.Slider:
    """Build the tab; returns the slider of guidance, which some models have."""
    with gr.Row():
        with gr.Column(min_width=280):
            seed = seed_field("draw")
            count = gr.Slider(1, MAX_IMAGES, 16, step=1, label="Images", elem_id="count-draw")
            temperature = gr.Slider(0.1, 2, 1, step=0.05, label="Temperature", info="Below 1: safer. Above: bolder.")
            top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="Leaves out the least probable levels.")
            guidance = gr.Slider(
                0, 5, 1, step=0.25, label="Guidance", info="Above 1: more like its class.", visible=False
            )
            buttons = start_and_stop("Draw", "draw")
        with gr.Column(min_width=280, scale=2):
            pictures = gr.HTML(elem_id="pictures-draw")
            status = gr.HTML(elem_id="status-draw")
    inputs = [model, class_name, seed, count, temperature, top_p, guidance]
    draw_on_click(buttons, handlers.draw, inputs, pictures, status)
    return guidance


def complete_tab(handlers: Handlers, model: gr.Dropdown, class_name: gr.Dropdown, value: CanvasValue) -> tuple:
    """Build the tab; returns its picture panel."""
    with gr.Row():
        with gr.Column(min_width=280):
            panel = picture_panel("complete", value)
        with gr.Column(min_width=280):
            with gr.Row():
                seed = seed_field("complete")
                count = gr.Slider(1, 8, 4, step=1, label="Completions", min_width=200, elem_id="count-complete")
            candidates = gr.Radio(
                [1, 4, 16], value=1, label="Candidates for each", elem_id="candidates",
                info="Of several, one is chosen by how likely it makes what is kept to the right and below.",
            )  # fmt: skip
            buttons = start_and_stop("Complete", "complete")
            pictures = gr.HTML(elem_id="pictures-complete")
            status = gr.HTML(elem_id="status-complete")
    inputs = [model, class_name, panel[0], count, candidates, seed]
    draw_on_click(buttons, handlers.complete, inputs, pictures, status)
    return panel


def score_tab(handlers: Handlers, model: gr.Dropdown, class_name: gr.Dropdown, value: CanvasValue) -> tuple:
    """Build the tab; returns its picture panel."""
    with gr.Row():
        with gr.Column(min_width=280):
            panel = picture_panel("score", value)
        with gr.Column(min_width=280):
            start = gr.Button("Score", variant="primary", elem_id="start-score")
            result = gr.HTML(elem_id="result-score")
    start.click(plain_errors(handlers.score), [model, class_name, panel[0]], result, **ONE_AT_A_TIME)
    return panel


def look_tab(
    handlers: Handlers, tab: gr.Tab, model: gr.Dropdown, class_name: gr.Dropdown, value: CanvasValue
) -> tuple[tuple, gr.Radio]:
    """Build the tab; returns its picture panel and the choice of a colour channel."""
    with gr.Row():
        with gr.Column(min_width=280):
            panel = picture_panel("look", value)
        with gr.Column(min_width=280):
            channel = gr.Radio(CHANNELS, value=CHANNELS[0], label="Colour channel", visible=False)
            result = gr.HTML(html.message("Click a pixel of the picture."), elem_id="result-look")
    inputs = [model, class_name, panel[0], channel]
    for listen in (panel[0].input, channel.input, tab.select):
        listen(plain_errors(handlers.look), inputs, result, trigger_mode="always_last", **ONE_AT_A_TIME)
    return panel, channel


def connect_panels(handlers: Handlers, model: gr.Dropdown, class_name: gr.Dropdown, panels: list[tuple]):
    """The three canvases show one picture, wherever it is chosen or changed."""
    canvases, notes = [panel[0] for panel in panels], [panel[3] for panel in panels]
    for canvas, upload, draw_one, _ in panels:
        others = [other for other in canvases if other is not canvas]
        canvas.input(None, canvas, others, js="(value) => [value, value]")
        canvas.pick(plain_errors(handlers.pick), model, canvases + notes)
        upload.upload(plain_errors(handlers.upload), [model, upload], canvases + notes)
        seed = gr.State(0)
        draw_one.click(
            plain_errors(handlers.draw_one), [model, class_name, seed], canvases + notes, **ONE_AT_A_TIME
        ).success(lambda seed: seed + 1, seed, seed)


def build_page(folders: Iterable[Path]) -> gr.Blocks:
    r"""
    The page on some models.

    Args:
        folders (iterable of `Path`): Of models with image processors, as `training/publish.py` writes them.
    """
    models = {folder.name: actions.load_shown_model(folder) for folder in folders}
    if not models:
        raise ValueError("There is no model to show.")
    handlers, first = Handlers(models), next(iter(models))
    value, _ = handlers.fitted(models[first], digit(3))
    with gr.Blocks(title="hf_pixelcnn", analytics_enabled=False, delete_cache=(600, 600), fill_width=True) as page:
        gr.Markdown(INTRO)
        with gr.Row():
            model = gr.Dropdown(list(models), value=first, label="Model", min_width=280, elem_id="model")
            names = models[first].class_names
            class_name = gr.Dropdown(
                [ANY, *names], value=ANY, label="Class", visible=bool(names), min_width=280, elem_id="class",
                info="any: to draw, all in turn; for a picture, the most probable one.",
            )  # fmt: skip
        about = gr.HTML(facts(models[first]))
        with gr.Tabs():
            with gr.Tab("Draw"):
                guidance = draw_tab(handlers, model, class_name)
            with gr.Tab("Complete"):
                complete = complete_tab(handlers, model, class_name, value)
            with gr.Tab("Score"):
                score = score_tab(handlers, model, class_name, value)
            with gr.Tab("Look inside") as tab:
                look, channel = look_tab(handlers, tab, model, class_name, value)
        panels = [complete, score, look]
        connect_panels(handlers, model, class_name, panels)
        changed = [
            about,
            class_name,
            guidance,
            channel,
            *(panel[0] for panel in panels),
            *(panel[3] for panel in panels),
        ]
        model.input(plain_errors(handlers.choose_model), [model, look[0]], changed)
    return page.queue(max_size=32)


def launch_page(page: gr.Blocks, **options):
    r"""
    Start a page: no fonts or scripts of other servers, no analytics, uploads of at most `MAX_BYTES`.

    Args:
        page (`gr.Blocks`): What [`build_page`] returned.
        options: As for `Blocks.launch`.
    """
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    return page.launch(
        theme=gr.themes.Default(**fonts),
        css=html.STYLE,
        max_file_size=uploads.MAX_BYTES,
        footer_links=["settings"],
        show_error=True,
        ssr_mode=False,
        **options,
    )
