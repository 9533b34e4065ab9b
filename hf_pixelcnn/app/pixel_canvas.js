// The behaviour of `pixel_canvas` (pixel_canvas.py). Its value: {height, width, is_colour, pixels, hidden, row, column}, where
// `pixels` is base64 of height × width × 3 bytes and `hidden` base64 of height × width bytes, 1 where a pixel is brushed
// out.
// Events: "input" after every change by the user, "pick" when a bundled picture is chosen.
const canvas = element.querySelector("canvas");
const context = canvas.getContext("2d");
const here = element.querySelector(".here");
const isPicker = canvas.dataset.mode === "look";
const CELL = 12; // canvas pixels to a side of an image pixel
let picture = null;
let last = null; // where the pointer was, while it is down
let timer = null; // of a change by keys that is not written yet

const decode = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const encode = (bytes) => btoa(String.fromCharCode(...bytes));
const clamp = (value, size) => Math.min(Math.max(value, 0), size - 1);
const chosen = (name) => element.querySelector(`[data-name=${name}]:checked`)?.value;

function read() {
  if (!props.value || !props.value.pixels) return;
  picture = { ...props.value, pixels: decode(props.value.pixels), hidden: decode(props.value.hidden) };
  show();
}

function write(event) {
  props.value = { ...picture, pixels: encode(picture.pixels), hidden: encode(picture.hidden) };
  trigger(event);
}

function show() {
  const { height, width, pixels, hidden, row, column } = picture;
  const tint = element.querySelector(".tint");
  if (tint) tint.hidden = !picture.is_colour;
  canvas.width = width * CELL;
  canvas.height = height * CELL;
  for (let i = 0; i < height * width; i++) {
    const x = (i % width) * CELL, y = Math.floor(i / width) * CELL;
    context.fillStyle = `rgb(${pixels[3 * i]}, ${pixels[3 * i + 1]}, ${pixels[3 * i + 2]})`;
    context.fillRect(x, y, CELL, CELL);
    if (hidden[i] && canvas.dataset.mode === "complete") {
      context.fillStyle = "rgba(255, 122, 26, 0.75)";
      context.fillRect(x, y, CELL, CELL);
      context.fillStyle = "rgba(255, 255, 255, 0.5)";
      context.fillRect(x + CELL / 2 - 1, y + CELL / 2 - 1, 2, 2);
    }
  }
  if (isPicker || document.activeElement === canvas) {
    context.lineWidth = 2;
    context.strokeStyle = "#000";
    context.strokeRect(column * CELL - 1, row * CELL - 1, CELL + 2, CELL + 2);
    context.strokeStyle = "#ff7a1a";
    context.strokeRect(column * CELL + 1, row * CELL + 1, CELL - 2, CELL - 2);
  }
  here.textContent = `row ${row}, column ${column}`;
}

function dab(row, column) {
  const tool = chosen("tool"), size = Number(element.querySelector(".size")?.value ?? 1);
  const colour = element.querySelector(".colour")?.value ?? "#ffffff";
  const { height, width, pixels, hidden } = picture;
  for (let r = row - size; r <= row + size; r++) {
    for (let c = column - size; c <= column + size; c++) {
      const isInside = r >= 0 && r < height && c >= 0 && c < width;
      if (!isInside || (r - row) ** 2 + (c - column) ** 2 >= size ** 2) continue;
      const i = r * width + c;
      if (tool === "hide") hidden[i] = 1;
      if (tool === "keep") hidden[i] = 0;
      for (let k = 0; k < 3; k++) {
        if (tool === "paint") pixels[3 * i + k] = parseInt(colour.slice(1 + 2 * k, 3 + 2 * k), 16);
        if (tool === "rub") pixels[3 * i + k] = 0;
      }
    }
  }
}

function moveTo(row, column) {
  picture.row = clamp(row, picture.height);
  picture.column = clamp(column, picture.width);
}

function place(event) {
  const box = canvas.getBoundingClientRect();
  return [
    Math.floor(((event.clientY - box.top) / box.height) * picture.height),
    Math.floor(((event.clientX - box.left) / box.width) * picture.width),
  ];
}

function stroke(event) {
  const [row, column] = place(event);
  const [fromRow, fromColumn] = last ?? [row, column];
  const steps = Math.max(Math.abs(row - fromRow), Math.abs(column - fromColumn), 1);
  for (let step = 0; step <= steps; step++) {
    const share = step / steps;
    dab(Math.round(fromRow + share * (row - fromRow)), Math.round(fromColumn + share * (column - fromColumn)));
  }
  last = [row, column];
  moveTo(row, column);
  show();
}

canvas.addEventListener("pointerdown", (event) => {
  if (!picture) return;
  canvas.focus({ preventScroll: true });
  try { canvas.setPointerCapture(event.pointerId); } catch { /* a pointer that is gone already */ }
  last = null;
  stroke(event);
});
canvas.addEventListener("pointermove", (event) => { if (last) stroke(event); });
for (const name of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(name, () => {
    if (!last) return;
    last = null;
    write("input");
  });
}

canvas.addEventListener("keydown", (event) => {
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  const isDab = event.key === " " || event.key === "Enter";
  if (!picture || !(event.key in moves || isDab)) return;
  event.preventDefault();
  if (isDab) dab(picture.row, picture.column);
  else moveTo(picture.row + moves[event.key][0], picture.column + moves[event.key][1]);
  show();
  clearTimeout(timer); // a key that is held down is one change
  timer = setTimeout(writeKeys, 200);
});
canvas.addEventListener("focus", () => picture && show());
canvas.addEventListener("blur", () => {
  if (timer) writeKeys(); // before the button that takes the focus is clicked
  else if (picture) show();
});

function writeKeys() {
  clearTimeout(timer);
  timer = null;
  show();
  write("input");
}

const parts = {
  none: () => false,
  lower: (row) => row >= picture.height / 2,
  right: (row, column) => column >= picture.width / 2,
  middle: (row, column) => {
    const inside = (value, size) => value >= size / 4 && value < size - size / 4;
    return inside(row, picture.height) && inside(column, picture.width);
  },
};

element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button || !picture) return;
  if (button.dataset.hide) {
    const isHidden = parts[button.dataset.hide], { height, width } = picture;
    picture.hidden = Uint8Array.from({ length: height * width }, (_, i) => isHidden(Math.floor(i / width), i % width));
  } else if (button.dataset.pick) {
    trigger("pick", { index: Number(button.dataset.pick) });
    return;
  } else if (button.dataset.clear) {
    picture.pixels.fill(0);
  }
  show();
  write("input");
});

watch("value", read);
read();
