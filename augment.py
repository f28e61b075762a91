"""What happens to an image between its file and the model, as in the published run of 2205.01580.

`train_image` and `eval_image` make uint8 images; `mixup` or `scale` brings a batch to [-1, 1].

Shapes: I side of a square image, B batch, C classes; [] is a number.
"""

import functools
import math

import tensorflow as tf

# What draws random numbers, each with its own seeds. New names go to the end, up to 64.
STREAMS = ("files", "windows", "crops", "flips", "rand_augment", "mixup")


def seed_for(stream, seed):
  """A stream's seed, int64 [2], from (the run's seed, the number of the draw)."""
  return tf.convert_to_tensor([seed[0] * 64 + STREAMS.index(stream), seed[1]], tf.int64)


# --- The way of an image ---


def train_image(image_bytes, seed, image_size=224, randaug_layers=2, randaug_magnitude=10):
  """An encoded image -> uint8 [I, I, 3]: random crop, resizing, random flip, RandAugment.

  seed: (the run's seed, another number each time). tf.errors.OpError: a bad image.
  """
  image = decode_random_crop(image_bytes, seed_for("crops", seed))
  image = tf.image.resize(image, (image_size, image_size))  # bilinear, without antialiasing
  image = tf.cast(image, tf.uint8)  # truncated
  image = tf.image.stateless_random_flip_left_right(image, seed_for("flips", seed))
  return rand_augment(image, seed_for("rand_augment", seed), randaug_layers, randaug_magnitude)


def decode_random_crop(image_bytes, seed):
  """The "inception crop" (arXiv 1409.4842): a random box of 5 to 100 % of the image, uint8."""

  def box(shape):  # [height, width, channels] -> [row, column, height, width]
    begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
        shape, tf.zeros([0, 0, 4]), seed, min_object_covered=0.0, aspect_ratio_range=(0.75, 1.33),
        area_range=(0.05, 1.0), max_attempts=100, use_image_if_no_bounding_boxes=True)
    return tf.concat([begin[:2], size[:2]], 0)

  def jpeg():  # only the box is decoded
    shape = tf.io.extract_jpeg_shape(image_bytes)
    return tf.io.decode_and_crop_jpeg(image_bytes, box(shape), channels=3)

  def other():
    image = decode(image_bytes)
    return tf.image.crop_to_bounding_box(image, *tf.unstack(box(tf.shape(image))))

  return tf.cond(tf.io.is_jpeg(image_bytes), jpeg, other)


def decode(image_bytes):
  """An encoded image -> uint8 [height, width, 3]."""
  # TensorFlow reads an 8-bit BMP as grey: entry i of its palette must be (i, i, i). The palette is
  # behind a header of byte 14's length and ends where byte 10 points.
  head = tf.cast(tf.io.decode_raw(image_bytes, tf.uint8, fixed_length=1300), tf.int32)
  begin, end, i = head[14] + 14, head[10] + 256 * head[11], tf.range(256)[:, None]
  grey = (tf.gather(head, begin + 4 * i + tf.range(3)) == i) | (begin + 4 * i >= end)
  colours = (tf.strings.substr(image_bytes, 0, 2) == "BM") & (head[28] == 8) & ~tf.reduce_all(grey)
  tf.debugging.Assert(~colours, ["a BMP with a palette of colours"])
  return tf.io.decode_image(image_bytes, channels=3, expand_animations=False)


def eval_image(image_bytes, image_size=224):
  """An encoded image -> uint8 [I, I, 3]: shorter side to I * 256 / 224 by area, central crop.

  tf.errors.OpError: a bad image.
  """
  image = decode(image_bytes)
  sides = tf.cast(tf.shape(image)[:2], tf.float32)
  sides = tf.round(sides * (round(image_size * 256 / 224) / tf.reduce_min(sides)))
  image = tf.image.resize(image, tf.cast(sides, tf.int32), method="area")
  return tf.image.resize_with_crop_or_pad(tf.cast(image, tf.uint8), image_size, image_size)


def scale(images):
  """uint8 [0, 255] -> float32 [-1, 1], of any shape."""
  # x / 127.5 - 1, but 255 gives exactly 1 even where XLA multiplies by the reciprocal.
  return (tf.cast(images, tf.float32) - 127.5) / 127.5


def rand_augment(image, seed, num_layers=2, magnitude=10):
  """RandAugment (arXiv 1909.13719) of an image, uint8 [height, width, 3], whose shape is static.

  Each of `num_layers` layers draws one operation, uniformly and with replacement. seed: int [2].
  """
  if not num_layers:
    return image
  # For each layer: an operation, a sign, and the row and column of a centre.
  draws = tf.random.stateless_uniform([num_layers, 4], seed, alg="philox")
  return _layers(image, draws, magnitude)


@tf.function(jit_compile=True)  # by XLA: single TensorFlow kernels are slow at this
def _layers(image, draws, magnitude):
  """The image after one operation for each row of draws [layers, 4] in [0, 1)."""
  height, width, _ = image.shape

  def layer(image, draw):
    center = tf.cast(draw[2:] * (height, width), tf.int32)
    sign = tf.where(draw[1] < 0.5, -1.0, 1.0)
    given = arguments(magnitude, sign, center, max(height, width))
    return tf.switch_case(tf.cast(draw[0] * len(given), tf.int32),
                          [functools.partial(op, image, *args) for op, args in given.items()])

  return tf.foldl(layer, draws, image)  # a loop: each operation is compiled once for all layers


def arguments(magnitude, sign, center, size):
  """{operation: its arguments}: what RandAugment draws from, at a magnitude.

  sign: +1 or -1. center: (row, column). size: the side of the image in pixels.
  """
  strength = magnitude / 10
  ratio = size / 224  # the published lengths in pixels are for images of 224
  factor = 1.8 * strength + 0.1
  shear, shift = sign * (0.3 * strength), sign * (100 * strength * ratio)
  return {
      auto_contrast: (), equalize: (), invert: (), rotate: (sign * (30 * strength),),
      # No bit at all would be a shift by 8, which the published code's uint8 clamps to 7.
      posterize: (max(1, int(4 * strength)),),
      # The published code compares uint8 with 256 at magnitude 10, which wraps to 0: all inverted.
      solarize: (int(256 * strength) % 256,), solarize_add: (int(110 * strength),),
      color: (factor,), contrast: (factor,), brightness: (factor,), sharpness: (factor,),
      shear_x: (shear,), shear_y: (shear,), translate_x: (shift,), translate_y: (shift,),
      cutout: (int(int(40 * strength) * ratio), center),
  }


def mixup(images, labels, seed, p=0.2, dtype=tf.float32):
  """Mixup (arXiv 1710.09412): each image with the one before it, all in one proportion a.

  images: uint8 [B, height, width, 3]. labels: float32 [B, C], one-hot. seed: int [2].
  p: a is a draw of Beta(p, p), mirrored to be at least 1/2.
  Returns a * x + (1 - a) * roll(x, 1, axis=0) of images, in [-1, 1] and the dtype, and of labels.
  """
  # X / (X + Y) is Beta(p, p) if X and Y are Gamma(p). Both may underflow, in float64 below p = 0.01
  # only: 1e-300 then makes a 1.
  gammas = tf.random.stateless_gamma([2], seed, p, dtype=tf.float64) + [1e-300, 0]
  a = tf.cast(tf.reduce_max(gammas) / tf.reduce_sum(gammas), tf.float32)
  return _scale_and_mix(images, a, dtype), a * labels + (1 - a) * tf.roll(labels, 1, axis=0)


@tf.function(jit_compile=True)  # by XLA, in one pass over the images
def _scale_and_mix(images, a, dtype):
  """The images' half of `mixup`."""
  images = scale(images)
  return tf.cast(a * images + (1 - a) * tf.roll(images, 1, axis=0), dtype)


# --- RandAugment's operations on an image, uint8 [height, width, 3] ---

EMPTY = 128  # pixels from outside the image: near 0 for the model


def blend(a, b, factor):
  """a + factor * (b - a), clipped and truncated: a at 0, b at 1, extrapolated beyond."""
  a, b = tf.cast(a, tf.float32), tf.cast(b, tf.float32)
  return tf.saturate_cast(a + factor * (b - a), tf.uint8)


def auto_contrast(image):
  """Stretches each channel to the full range [0, 255]; a flat channel stays as it is."""
  x = tf.cast(image, tf.float32)
  low, high = tf.reduce_min(x, (0, 1)), tf.reduce_max(x, (0, 1))
  stretch = 255 / tf.maximum(high - low, 1)
  return tf.where(high > low, tf.saturate_cast(x * stretch - low * stretch, tf.uint8), image)


def equalize(image):
  """Flattens the histogram of each channel."""
  x = tf.cast(image, tf.int32)

  def table(channel):
    values = tf.reshape(x[..., channel], [-1])
    histogram = tf.math.unsorted_segment_sum(tf.ones_like(values), values, 256)
    step = (tf.size(values) - tf.gather(histogram, tf.reduce_max(values))) // 255
    # The definition shifts the table right by one, behind a 0: hence the exclusive sum.
    levels = (tf.cumsum(histogram, exclusive=True) + step // 2) // tf.maximum(step, 1)
    return tf.where(step == 0, tf.range(256), tf.minimum(levels, 255))

  # In a loop, as XLA would compute an entry of the table again for every pixel.
  tables = tf.reshape(tf.map_fn(table, tf.range(3)), [-1])
  return tf.cast(tf.gather(tables, x + [0, 256, 512]), tf.uint8)


def invert(image):
  return 255 - image

def posterize(image, bits):
  """Keeps the `bits` highest bits."""
  return image & (256 - 2 ** (8 - bits))

def solarize(image, threshold):
  """Inverts the pixels from the threshold on."""
  return tf.where(image < threshold, image, 255 - image)

def solarize_add(image, addition):
  """Adds to the pixels below 128."""
  return tf.where(image < 128, tf.minimum(image, 255 - addition) + addition, image)

def color(image, factor):
  """From grey (0) to the image (1) to more colour."""
  return blend(tf.image.rgb_to_grayscale(image), image, factor)

def contrast(image, factor):
  """From flat grey (0) to the image (1) to more contrast."""
  # The grey is meant to be the image's mean; the published code takes that of the 256 bins of its
  # histogram, 224 * 224 / 256 = 196 for any image, and so do we.
  return blend(196, image, factor)

def brightness(image, factor):
  """From black (0) to the image (1) to brighter."""
  return blend(0, image, factor)


def sharpness(image, factor):
  """From smoothed by [[1, 1, 1], [1, 5, 1], [1, 1, 1]] / 13 (0) to the image (1) to sharpened."""
  x = tf.cast(image, tf.uint16)
  rows = x[:-2] + x[1:-1] + x[2:]
  smooth = (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * x[1:-1, 1:-1]) // 13
  inner = blend(smooth, image[1:-1, 1:-1], factor)
  middle = tf.concat([image[1:-1, :1], inner, image[1:-1, -1:]], 1)
  return tf.concat([image[:1], middle, image[-1:]], 0)  # the border stays as it is


def _warp(image, origin):
  """out(x, y) = in(origin(x, y)), the nearest pixel; (0, 0) is the top left corner."""
  height, width, _ = image.shape
  x, y = origin(*tf.meshgrid(*(tf.range(side, dtype=tf.float32) for side in (width, height))))
  # Halves round away from zero, as in C; tf.round would move 4 % of a sheared image's pixels. 1e-4
  # because an exact half (0.3 * 5) may come out below.
  x, y = (tf.cast(tf.sign(t) * tf.floor(tf.abs(t) + 0.5001), tf.int32) for t in (x, y))
  inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
  pixels = tf.gather(tf.reshape(image, [-1, 3]), tf.where(inside, y * width + x, 0))
  return tf.where(inside[..., None], pixels, EMPTY)


def rotate(image, degrees):
  """Rotates about the centre ((width - 1) / 2, (height - 1) / 2)."""
  cy, cx = ((side - 1) / 2 for side in image.shape[:2])
  radians = tf.cast(degrees, tf.float32) * (math.pi / 180)
  cos, sin = tf.cos(radians), tf.sin(radians)
  return _warp(image, lambda x, y: (cos * (x - cx) - sin * (y - cy) + cx,
                                    sin * (x - cx) + cos * (y - cy) + cy))


def shear_x(image, level):
  return _warp(image, lambda x, y: (x + level * y, y))

def shear_y(image, level):
  return _warp(image, lambda x, y: (x, y + level * x))

def translate_x(image, pixels):
  return _warp(image, lambda x, y: (x + pixels, y))

def translate_y(image, pixels):
  return _warp(image, lambda x, y: (x, y + pixels))


def cutout(image, half_side, center):
  """Empties rows and columns [center - half_side, center + half_side); center = (row, column)."""
  rows, columns = ((tf.range(side) >= middle - half_side) & (tf.range(side) < middle + half_side)
                   for side, middle in zip(image.shape[:2], tf.unstack(center)))
  return tf.where(~(rows[:, None] & columns)[..., None], image, EMPTY)
