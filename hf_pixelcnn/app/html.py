"""What the page shows, as HTML: pictures inside it, so that none is written to a file."""

from html import escape

import torch
from PIL import Image

from ..receptive_field_causal_image import REGIONS
from .actions import Completions, Drawing, Look, Score, ShownModel
from .pixel_canvas import data_url, picture_url

# From nothing through red to light yellow: dark is expected, light is surprising.
HEAT = torch.tensor([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], dtype=torch.float32)


def figure(picture: Image.Image, alt: str, caption: str = "", kind: str = "small") -> str:
    text = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure class="{kind}"><img alt="{escape(alt)}" src="{picture_url(picture)}">{text}</figure>'


def message(*sentences: str) -> str:
    return f'<p class="message" role="status">{" ".join(sentences)}</p>'


def download(url: str, name: str) -> str:
    kind = name.rpartition(".")[2].upper()
    return f'<a class="download" download="{name}" href="{url}">Download {kind}</a>'


def drawing(shown: ShownModel, drawn: Drawing, num_images: int, seed: int) -> str:
    """The pictures so far; at the end with files to keep."""
    picture = figure(drawn.picture, f"{num_images} images drawn by {shown.name}", kind="large")
    if drawn.animation is None:
        return picture
    name = f"{shown.name}-seed-{seed}"
    links = download(picture_url(drawn.picture), f"{name}.png") + download(
        data_url(drawn.animation, "gif"), f"{name}.gif"
    )
    return f'{picture}<div class="links">{links}</div>'


def completions(original: Image.Image, given: Image.Image, drawn: Completions, num_candidates: int) -> str:
    """The picture, what is kept of it, and its completions."""
    figures = [figure(original, "the picture", "the picture"), figure(given, "the part that is kept", "kept")]
    for index, picture in enumerate(drawn.pictures):
        caption = f"{index + 1}"
        if index < len(drawn.sample_sizes):
            caption += f": {drawn.sample_sizes[index]:.1f} of {num_candidates}"
        figures.append(figure(picture, f"completion {index + 1}", caption))
    return f'<div class="figures">{"".join(figures)}</div>'


def heat_map(surprise: torch.Tensor) -> Image.Image:
    """Nats per pixel `(height, width)` as colours, from 0 to the highest."""
    share = (surprise / surprise.max().clamp(min=1e-6)).clamp(0, 1) * (len(HEAT) - 1)
    low = share.floor().long().clamp(max=len(HEAT) - 2)
    part = (share - low)[..., None]
    colours = HEAT[low] * (1 - part) + HEAT[low + 1] * part
    return Image.fromarray(colours.round().to(torch.uint8).numpy())


def bars(shares: dict[str, float], marked: str) -> str:
    """Horizontal bars, one for each name, one of them marked."""
    rows = "".join(
        f'<tr{" class=marked" * (name == marked)}><th scope="row">{escape(name)}</th>'
        f'<td class="track"><div style="width: {100 * share:.2f}%"></div></td><td>{100 * share:.1f} %</td></tr>'
        for name, share in shares.items()
    )
    return f'<table class="bars">{rows}</table>'


def score(shown: ShownModel, picture: Image.Image, found: Score) -> str:
    """All that [`Score`] says."""
    highest = found.surprise.max().item()
    legend = picture_url(heat_map(torch.linspace(0, 1, 128).expand(6, 128)))
    figures = (
        figure(picture, "the picture as the model sees it", "as the model sees it", kind="medium")
        + f'<figure class="medium"><img alt="surprise of each pixel" src="{picture_url(heat_map(found.surprise))}">'
        f'<figcaption>surprise: 0 <img class="legend" alt="to" src="{legend}"> {highest:.2f} nats per pixel'
        "</figcaption></figure>"
    )
    condition = "" if found.class_id is None else f" given class {escape(shown.class_names[found.class_id])}"
    rows = [
        (f"nats{condition}", f"{found.nats:.2f}"),
        ("bits per dimension", f"{found.bits_per_dim:.4f}"),
        ("PNG file", f"{found.png_bytes:,} bytes"),
        ("compressed with the model", f"{found.payload_bytes:,} bytes, decoded and compared: no level differs"),
        ("with the header of the stream", f"{found.stream_bytes:,} bytes"),
    ]
    table = "".join(f'<tr><th scope="row">{name}</th><td>{value}</td></tr>' for name, value in rows)
    text = f'<div class="figures">{figures}</div><table class="facts">{table}</table>'
    if found.class_probabilities is not None:
        shares = dict(zip(shown.class_names, found.class_probabilities.tolist(), strict=True))
        best = max(shares, key=lambda name: shares[name])
        text += "<h4>Class by Bayes’ rule, p(class | picture)</h4>" + bars(shares, best)
    return text


def level_bars(probabilities: torch.Tensor, level: int) -> str:
    """The probability of each level as upright bars in an SVG, the true one marked."""
    count, height = len(probabilities), 120
    shares = (probabilities / probabilities.max()).tolist()
    each = 512 / count
    gap = 0 if count > 64 else 0.1 * each
    rectangles = "".join(
        f'<rect class="{"true" if i == level else "bar"}" x="{i * each + gap:.2f}" y="{height * (1 - share):.2f}" '
        f'width="{each - 2 * gap:.2f}" height="{height * share:.2f}"/>'
        for i, share in enumerate(shares)
    )
    middle = (level + 0.5) * each
    arrow = f'<path class="true" d="M{middle - 6:.1f} 134 h12 l-6 -11 z"/>'
    return (
        f'<svg class="levels" viewBox="0 0 512 136" role="img" aria-label="probability of each level">{rectangles}'
        f'<path class="axis" d="M0 {height} h512"/>{arrow}</svg>'
        f'<div class="ends"><span>level 0</span><span>level {count - 1}</span></div>'
    )


def region_map(shown: ShownModel, picture: Image.Image, found: Look) -> Image.Image:
    """The picture, tinted by what its pixels are to the predicted one."""
    colours = torch.tensor([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in REGIONS.values()])
    tints = colours[found.regions].to(torch.uint8)
    tinted = Image.blend(picture.convert("RGB"), Image.fromarray(tints.numpy()), 0.7)
    cell = 10
    return tinted.resize((tinted.width * cell, tinted.height * cell), Image.Resampling.NEAREST)


def look(shown: ShownModel, picture: Image.Image, found: Look, row: int, column: int, channel: str) -> str:
    """All that [`Look`] says about one dimension."""
    key = "".join(
        f'<li><span class="key" style="background: {colour}"></span>{name}: {found.counts[name]:,}</li>'
        for name, colour in REGIONS.items()
        if name != "predicted pixel"
    )
    true = found.probabilities[found.level].item()
    most = int(found.probabilities.argmax())
    what = f"row {row}, column {column}" + (f", {channel}" if channel else "")
    text = (
        f"The true level is {found.level}, with probability {true:.4f}; the most probable one is {most}, with "
        f"{found.probabilities[most].item():.4f}."
    )
    alt = "what the prediction can depend on"
    return (
        f'<div class="figures">{figure(region_map(shown, picture, found), alt, f"pixel at {what}", kind="medium")}'
        f'<ul class="keys">{key}</ul></div>'
        f"<h4>What the model expects there</h4>{level_bars(found.probabilities, found.level)}{message(text)}"
    )


STYLE = """
.gradio-container { width: 100%; max-width: 1080px !important; margin: 0 auto !important; }
.gradio-container .html-container { padding: 0; }
/* What went wrong is said once, in words, and not over what is there. */
.gradio-container [data-testid="status-tracker"]:has(> .error) { display: none; }
/* As long as pictures are drawn, a click on the button that starts it does nothing. */
.gradio-container:has(#pictures-draw > [data-testid="status-tracker"]:not(.hide, :has(> .error))) #start-draw,
.gradio-container:has(#pictures-complete > [data-testid="status-tracker"]:not(.hide, :has(> .error))) #start-complete {
  opacity: 0.5; pointer-events: none; }
footer > .divider { display: none; }
@media (max-width: 640px) {
  .gradio-container .main { padding: 12px !important; }
  .tab-container button { padding: 0 8px !important; }
}
figure { margin: 0; }
figure img { display: block; width: 100%; margin: 0; border-radius: 4px; image-rendering: pixelated;
  border: 1px solid var(--border-color-primary); }
figure.large { width: min(100%, 480px); } figure.medium { width: min(100%, 280px); }
figure.small { width: clamp(88px, 21%, 140px); }
figcaption { font-size: 0.8rem; opacity: 0.75; margin-top: 2px; }
figcaption img.legend { display: inline-block; width: 72px; height: 8px; vertical-align: middle; }
.figures { display: flex; flex-wrap: wrap; gap: 10px; align-items: flex-start; }
.links { display: flex; flex-wrap: wrap; gap: 8px; margin-top: 8px; }
a.download { padding: 6px 12px; border: 1px solid var(--border-color-primary); border-radius: 6px;
  text-decoration: none !important; color: var(--button-secondary-text-color) !important;
  background: var(--button-secondary-background-fill); }
a.download:focus-visible { outline: 2px solid var(--color-accent); outline-offset: 2px; }
p.message { margin: 8px 0 0; }
table.facts, table.bars { border-collapse: collapse; margin-top: 10px; width: auto; }
:is(table.facts, table.bars), :is(table.facts, table.bars) tr { border: 0 !important; background: none !important; }
table.facts :is(th, td), table.bars :is(th, td) { padding: 2px 12px 2px 0; text-align: left; font-weight: normal;
  border: 0 !important; background: none !important; color: inherit; }
table.facts td { font-variant-numeric: tabular-nums; }
table.bars { width: min(100%, 480px); } table.bars .track { width: 60%; }
table.bars .track div { height: 12px; border-radius: 3px; background: var(--neutral-400); }
table.bars .marked :is(th, td) { font-weight: 600; } table.bars .marked .track div { background: #4c8eda; }
svg.levels { width: min(100%, 512px); display: block; }
svg.levels .bar { fill: #4c8eda; } svg.levels .true { fill: #e4572e; }
svg.levels .axis { stroke: var(--body-text-color-subdued); stroke-width: 1; }
.ends { display: flex; justify-content: space-between; width: min(100%, 512px); font-size: 0.8rem; opacity: 0.75; }
ul.keys { list-style: none; padding: 0; margin: 0; font-size: 0.9rem; }
ul.keys .key { display: inline-block; width: 14px; height: 14px; margin-right: 6px; vertical-align: -2px;
  border: 1px solid var(--border-color-primary); border-radius: 3px; }
"""
