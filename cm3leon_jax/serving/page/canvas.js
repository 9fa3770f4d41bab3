// Shows the input image with a box on it, in pixels at the model's resolution.

const SIDES = ["left", "top", "right", "bottom"];
const MOST_SIDE = 2048; // Larger images are scaled before they are sent.

/** Returns the file itself, or a JPEG file of at most MOST_SIDE pixels if the image is larger. */
async function small(bitmap, blob) {
  const factor = MOST_SIDE / Math.max(bitmap.width, bitmap.height);
  if (factor >= 1) return blob;
  const [width, height] = [bitmap.width, bitmap.height].map((x) => Math.ceil(x * factor));
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0, width, height);
  return canvas.convertToBlob({ type: "image/jpeg", quality: 0.95 });
}

/** Shows the centered square of an image, with a box that can be dragged or typed. */
export class GivenImage {
  constructor(canvas, inputs) {
    this.canvas = canvas;
    this.inputs = inputs; // Name in SIDES -> number input.
    this.bitmap = null;
    this.blob = null;
    this.resolution = 0;
    this.start = null;
    for (const side of SIDES) inputs[side].addEventListener("input", () => this.draw());
    canvas.addEventListener("pointerdown", (event) => {
      this.start = this.place(event);
      canvas.setPointerCapture(event.pointerId);
      event.preventDefault();
    });
    canvas.addEventListener("pointermove", (event) => {
      if (this.start) this.drag(this.place(event));
    });
    for (const name of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(name, () => (this.start = null));
    }
  }

  /** Sets the side of the model's images in pixels, and resets the box. */
  resize(resolution) {
    this.resolution = resolution;
    const box = { left: 0, top: 0, right: resolution / 2, bottom: resolution / 2 };
    for (const side of SIDES) {
      this.inputs[side].max = resolution;
      this.inputs[side].value = Math.round(box[side]);
    }
  }

  /** Shows an image. Requests send the file, which the server crops in the same way. */
  async show(blob, name) {
    this.bitmap = await createImageBitmap(blob);
    this.blob = await small(this.bitmap, blob);
    this.canvas.setAttribute("aria-label", `Your image: ${name}`);
    this.draw();
  }

  place(event) {
    const bounds = this.canvas.getBoundingClientRect();
    const scale = this.resolution / bounds.width;
    const clamp = (x) => Math.min(Math.max(x, 0), this.resolution);
    return [clamp((event.clientX - bounds.left) * scale), clamp((event.clientY - bounds.top) * scale)];
  }

  drag([x, y]) {
    const [left, right] = [this.start[0], x].sort((a, b) => a - b);
    const [top, bottom] = [this.start[1], y].sort((a, b) => a - b);
    if (right - left < 1 || bottom - top < 1) return;
    this.inputs.left.value = Math.floor(left);
    this.inputs.top.value = Math.floor(top);
    this.inputs.right.value = Math.ceil(right);
    this.inputs.bottom.value = Math.ceil(bottom);
    this.draw();
  }

  box() {
    return SIDES.map((side) => Number.parseInt(this.inputs[side].value, 10));
  }

  draw() {
    if (!this.bitmap) return;
    const size = 480;
    this.canvas.width = this.canvas.height = size;
    const context = this.canvas.getContext("2d");
    const side = Math.min(this.bitmap.width, this.bitmap.height);
    const x = (this.bitmap.width - side) / 2;
    const y = (this.bitmap.height - side) / 2;
    context.imageSmoothingEnabled = side > size;
    context.fillStyle = "#fff";
    context.fillRect(0, 0, size, size);
    context.drawImage(this.bitmap, x, y, side, side, 0, 0, size, size);
    const [left, top, right, bottom] = this.box().map((value) => (value * size) / this.resolution);
    context.strokeStyle = getComputedStyle(this.canvas).getPropertyValue("--box");
    context.lineWidth = 4;
    context.setLineDash([14, 8]);
    context.strokeRect(left + 2, top + 2, right - left - 4, bottom - top - 4);
  }
}
