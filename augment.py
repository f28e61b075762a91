"""RandAugment and Mixup as the published run of arXiv 2205.01580 applies them.

    python augment.py [IMAGE.jpg] [--out=augment.png --magnitude=10]

writes a contact sheet: every operation on the picture, with its argument, and draws of RandAugment.

The sixteen operations are plain TensorFlow functions of a picture, uint8 [H, W, 3], and arguments.
They stay uint8: where arithmetic is in float, its result is clipped to [0, 255] and truncated.
Pixels that come from outside the picture are 128.

Shapes: H height, W width (of one picture; H = W = I in training), B batch, C classes.
"""

import functools
import math
import sys
import textwrap

from absl import app
from absl import flags
import numpy as np
import tensorflow as tf

EMPTY = 128  # of pixels from outside the picture: the middle of the range, near 0 for the model


# --- Grey levels ----------------------------------------------------------------------------------


def _uint8(x):
  """Clips to [0, 255] and truncates."""
  return tf.cast(tf.clip_by_value(x, 0, 255), tf.uint8)


def blend(a, b, factor):
  """a + factor * (b - a): a at 0, b at 1, extrapolated beyond."""
  a, b = tf.cast(a, tf.float32), tf.cast(b, tf.float32)
  return _uint8(a + factor * (b - a))


def auto_contrast(image, _=None):
  """Stretches each channel to the full range [0, 255]; a flat channel stays as it is."""
  # Over rows of 3 * W numbers first: XLA compiles that to vector instructions, over (0, 1) not.
  rows = tf.reshape(image, [image.shape[0], -1])
  low, high = (tf.cast(reduce(tf.reshape(reduce(rows, 0), [-1, 3]), 0), tf.float32)
               for reduce in (tf.reduce_min, tf.reduce_max))
  scale = 255 / tf.maximum(high - low, 1)
  return tf.where(high > low, _uint8(tf.cast(image, tf.float32) * scale - low * scale), image)


def equalize(image, _=None):
  """Flattens the histogram of each channel."""
  x = tf.cast(image, tf.int32)

  def table(channel):
    values = tf.reshape(x[..., channel], [-1])
    histogram = tf.math.unsorted_segment_sum(tf.ones_like(values), values, 256)
    step = (tf.size(values) - tf.gather(histogram, tf.reduce_max(values))) // 255
    # The exclusive sum is the recipe's table shifted right by one; the first entry becomes 0.
    levels = (tf.cumsum(histogram, exclusive=True) + step // 2) // tf.maximum(step, 1)
    return tf.where(step == 0, tf.range(256), tf.minimum(levels, 255))

  # In a loop, which XLA does not fuse into the gather: it would compute an entry at every pixel.
  tables = tf.reshape(tf.map_fn(table, tf.range(3)), [-1])
  return tf.cast(tf.gather(tables, x + [0, 256, 512]), tf.uint8)


def invert(image, _=None):
  return 255 - image


def posterize(image, bits):
  """Keeps the `bits` highest bits."""
  return image & (256 - 2 ** (8 - bits))


def solarize(image, threshold):
  """Inverts the pixels that are not below the threshold."""
  return tf.where(image < threshold, image, 255 - image)


def solarize_add(image, addition):
  """Adds to the pixels below 128."""
  return tf.where(image < 128, _uint8(tf.cast(image, tf.int32) + addition), image)


def color(image, factor):
  """From grey (0) to the picture (1) to more colour."""
  return blend(tf.image.rgb_to_grayscale(image), image, factor)


def contrast(image, factor):
  """From flat grey (0) to the picture (1) to more contrast."""
  # The grey is meant to be the picture's mean level. The published code takes the mean over the
  # 256 bins of its histogram instead, number of pixels / 256: 196 for 224x224, whatever the
  # picture. The published numbers used 196.
  return blend(196, image, factor)


def brightness(image, factor):
  """From black (0) to the picture (1) to brighter."""
  return blend(0, image, factor)


def sharpness(image, factor):
  """From smoothed by [[1, 1, 1], [1, 5, 1], [1, 1, 1]] / 13 (0) to the picture (1) to sharpened."""
  # Rows of 3 * W small numbers, where the neighbours are 3 apart, fill XLA's vector instructions.
  flat = tf.reshape(image, [image.shape[0], -1])
  x = tf.cast(flat, tf.uint16)
  rows = x[:-2] + x[1:-1] + x[2:]
  smooth = (rows[:, :-6] + rows[:, 3:-3] + rows[:, 6:] + 4 * x[1:-1, 3:-3]) // 13
  inner = blend(smooth, flat[1:-1, 3:-3], factor)
  middle = tf.concat([flat[1:-1, :3], inner, flat[1:-1, -3:]], 1)
  # The filter is not defined on the border.
  return tf.reshape(tf.concat([flat[:1], middle, flat[-1:]], 0), image.shape)


# --- Geometry -------------------------------------------------------------------------------------


def _warp(image, source):
  """out(x, y) = in(source(x, y)), the nearest pixel, EMPTY from outside; the origin is top left."""
  H, W, _ = image.shape
  xy = source(*tf.meshgrid(tf.range(W, dtype=tf.float32), tf.range(H, dtype=tf.float32)))  # [H, W]
  # Halves round away from zero, as C does. tf.round takes them to the even side: 4 % of a sheared
  # picture's pixels. 1e-4 because what is a half in exact arithmetic (0.3 * 5) may come out below.
  x, y = (tf.cast(tf.sign(c) * tf.floor(tf.abs(c) + 0.5001), tf.int32) for c in xy)
  inside = (x >= 0) & (x < W) & (y >= 0) & (y < H)
  # Pixels padded to four bytes are gathered as one word each, not as three bytes.
  words = tf.reshape(tf.bitcast(tf.pad(image, [[0, 0], [0, 0], [0, 1]]), tf.int32), [-1])
  words = tf.where(inside, tf.gather(words, tf.where(inside, y * W + x, 0)), EMPTY * 0x010101)
  return tf.bitcast(words, tf.uint8)[..., :3]


def rotate(image, degrees):
  """Rotates about the centre ((W - 1) / 2, (H - 1) / 2)."""
  cy, cx = ((side - 1) / 2 for side in image.shape[:2])
  radians = tf.cast(degrees, tf.float32) * (math.pi / 180)
  c, s = tf.cos(radians), tf.sin(radians)
  return _warp(image, lambda x, y: (c * (x - cx) - s * (y - cy) + cx,
                                    s * (x - cx) + c * (y - cy) + cy))


def shear_x(image, level):
  """out(x, y) = in(x + level * y, y)."""
  return _warp(image, lambda x, y: (x + level * y, y))


def shear_y(image, level):
  """out(x, y) = in(x, y + level * x)."""
  return _warp(image, lambda x, y: (x, y + level * x))


def translate_x(image, pixels):
  """out(x, y) = in(x + pixels, y)."""
  return _warp(image, lambda x, y: (x + pixels, y))


def translate_y(image, pixels):
  """out(x, y) = in(x, y + pixels)."""
  return _warp(image, lambda x, y: (x, y + pixels))


def cutout(image, half_side, center):
  """Empties rows and columns [center - half_side, center + half_side); center = (row, column)."""
  rows, columns = ((tf.range(side) >= c - half_side) & (tf.range(side) < c + half_side)
                   for side, c in zip(image.shape[:2], tf.unstack(center)))
  return tf.where((rows[:, None] & columns)[..., None], tf.constant(EMPTY, tf.uint8), image)


# --- RandAugment and Mixup ------------------------------------------------------------------------


def arguments(magnitude, sign, center, size):
  """What each operation gets at a magnitude, in the published order: {op: tuple}.

  sign is +1 or -1, center (row, column), size the side of the picture in pixels.
  """
  factor = 1.8 * magnitude / 10 + 0.1
  pixels = size / 224  # lengths are given for pictures of 224 pixels
  return {
      auto_contrast: (), equalize: (), invert: (),
      rotate: (sign * (30 * magnitude / 10),),
      # No bit at all would be a shift by 8, which the published code's uint8 clamps to 7.
      posterize: (max(1, int(4 * magnitude / 10)),),
      # The published code compares uint8 with 256 at magnitude 10, which wraps to 0: all inverted.
      solarize: (int(256 * magnitude / 10) % 256,),
      solarize_add: (int(110 * magnitude / 10),),
      color: (factor,), contrast: (factor,), brightness: (factor,), sharpness: (factor,),
      shear_x: (sign * (0.3 * magnitude / 10),), shear_y: (sign * (0.3 * magnitude / 10),),
      translate_x: (sign * (100 * magnitude / 10 * pixels),),
      translate_y: (sign * (100 * magnitude / 10 * pixels),),
      cutout: (int(int(40 * magnitude / 10) * pixels), center),
  }


OPS = tuple(arguments(10, 1.0, (0, 0), 224))


@tf.function(jit_compile=True)  # by XLA: single TensorFlow kernels are slow at this
def _layers(image, flip, draws, magnitude):
  """The flip, then a layer for each row of draws: which operation, which sign, which centre."""
  image = tf.cast(image, tf.uint8)
  image = tf.where(flip, image[:, ::-1], image)
  H, W, _ = image.shape
  # TensorFlow makes this a loop of XLA, so that each operation is compiled once for all layers.
  for draw in draws if len(draws) else ():
    center = tf.cast(draw[2:] * (H, W), tf.int32)
    given = arguments(magnitude, tf.where(draw[1] < 0.5, -1.0, 1.0), center, max(H, W))
    image = tf.switch_case(tf.cast(draw[0] * len(given), tf.int32),
                           [functools.partial(op, image, *args) for op, args in given.items()])
  return image


def rand_augment(image, seed, num_layers=2, magnitude=10, flip=False):
  """RandAugment (Cubuk et al., arXiv 1909.13719): operations, each drawn uniformly and applied.

  Args:
    image: [H, W, 3] in [0, 255], H and W known when the graph is built; truncated to uint8.
    seed: int [2]; the same seed gives the same picture, always.
    num_layers: operations one after the other; the same one may come twice.
    magnitude: of every operation, 10 in the published run.
    flip: bool [], whether to mirror the picture first, in the same pass over it.

  Returns:
    uint8 [H, W, 3].
  """
  draws = tf.random.stateless_uniform([num_layers, 4], seed, alg="philox")
  return _layers(image, flip, draws, magnitude)


@tf.function(jit_compile=True)
def _mix(images, a, scale, dtype):
  """Scales and mixes in one pass over the images."""
  images = scale(images)
  return tf.cast(a * images + (1 - a) * tf.roll(images, 1, axis=0), dtype)


def mixup(images, labels, seed, p=0.2, scale=tf.identity, dtype=tf.float32):
  """Mixup (Zhang et al., arXiv 1710.09412): each image with its neighbour, all in one proportion.

  Args:
    images: [B, H, W, 3], float32 after `scale`.
    labels: float32 [B, C], one-hot.
    seed: int [2].
    p: the proportion is a draw of Beta(p, p), mirrored to be at least 1/2, so that an image
      dominates its neighbour.
    scale: function(images), applied first.
    dtype: of the mixed images; rounded to at the very end.

  Returns:
    images and labels, a * x + (1 - a) * roll(x, 1, axis=0).
  """
  # a / (a + b) of two Gammas is Beta. In float32 both underflow to 0 at p = 0.2 now and then, and
  # 0 / 0 is a NaN; in float64 only below p = 0.01, where 1e-300 then makes the proportion 1.
  gammas = tf.random.stateless_gamma([2], seed, p, dtype=tf.float64) + [1e-300, 0]
  a = tf.cast(tf.reduce_max(gammas) / tf.reduce_sum(gammas), tf.float32)
  return _mix(images, a, scale, dtype), a * labels + (1 - a) * tf.roll(labels, 1, axis=0)


# --- Contact sheet --------------------------------------------------------------------------------


def draw_grid(path, images, captions, columns=8):
  """Writes a PNG of captioned pictures, uint8 [H, W, 3] each, `columns` in a row."""
  from PIL import Image, ImageDraw  # comes with tensorboard; only drawing needs it
  zoom = -(-160 // max(image.shape[1] for image in images))  # captions need some width
  images = [np.asarray(image).repeat(zoom, 0).repeat(zoom, 1) for image in images]
  height, width = (max(image.shape[axis] for image in images) + 4 for axis in (0, 1))
  captions = [textwrap.wrap(caption, width // 6) for caption in captions]
  top = 12 * max(map(len, captions)) + 2
  rows = -(-len(images) // columns)
  sheet = Image.new("RGB", (columns * width, rows * (top + height)), "white")
  draw = ImageDraw.Draw(sheet)
  for i, (image, lines) in enumerate(zip(images, captions)):
    x, y = i % columns * width, i // columns * (top + height)
    sheet.paste(Image.fromarray(image), (x, y + top))
    for j, line in enumerate(lines):
      draw.text((x + 2, y + 12 * j + 1), line, fill="black")
  with tf.io.gfile.GFile(path, "wb") as f:
    sheet.save(f, "PNG")


def _own_picture():
  """A picture with an up and a right, smooth and sharp parts, and all colours."""
  y, x = np.mgrid[:224, :224] / 224
  picture = np.stack([255 * x, 255 * y, 255 * (1 - x) * (1 - y)], -1)
  picture[(x - 0.3) ** 2 + (y - 0.35) ** 2 < 0.03] = (250, 200, 30)
  picture[(abs(x - 0.7) < 0.15) & (abs(y - 0.6) < 0.25)] *= 0.4
  picture[(y > 0.8) & (x * 16 % 2 < 1)] = 20
  return picture.astype(np.uint8)


def main(argv):
  image = _own_picture()
  if len(argv) > 2:
    sys.exit(f"Error: {' '.join(argv[2:])}: expected one picture")
  if len(argv) > 1:
    try:
      image = tf.io.decode_image(tf.io.read_file(argv[1]), 3, expand_animations=False)
    except tf.errors.OpError as error:
      sys.exit(f"Error: {argv[1]} is not a picture that can be read: {error.message}")
    image = tf.image.resize_with_crop_or_pad(image, *[min(image.shape[:2])] * 2)
    image = tf.cast(tf.image.resize(image, (224, 224), antialias=True), tf.uint8).numpy()
  given = arguments(FLAGS.magnitude, 1.0, tf.constant([80, 150]), 224)
  pictures, captions = [image], ["the picture"]
  for op, args in given.items():
    pictures.append(tf.function(op, jit_compile=True)(tf.constant(image), *args))
    captions.append(" ".join([op.__name__] + [f"{float(a):.3g}" for a in args[:1]]))
  for i in range(56 - len(pictures)):  # seven rows of eight
    pictures.append(rand_augment(tf.constant(image), (0, i), 2, FLAGS.magnitude))
    captions.append(f"rand_augment, seed {i}")
  draw_grid(FLAGS.out, pictures, captions)
  print(f"Wrote {FLAGS.out}: the operations at magnitude {FLAGS.magnitude:g}, then draws of two.")


if __name__ == "__main__":
  FLAGS = flags.FLAGS
  flags.DEFINE_string("out", "augment.png", "Where the contact sheet goes.")
  flags.DEFINE_float("magnitude", 10, "Magnitude of every operation.", 0, 20)
  app.run(main)
