"""The plain Vision Transformer of "Better plain ViT baselines for ImageNet-1k" (arXiv 2205.01580).

A model is its parameters, a nested dict of float32 arrays named as in the published checkpoints,
and a `Config`, its size and options.

Shapes: B batch, I image side, P patch side, L tokens, D width, N heads, H head dim (D = N*H), M MLP
width, C classes. In einsums: b l d n h m as above, o the C outputs, e another D; y and x rows and
columns of patches, i and j of pixels in a patch, c colours; q tokens that attend to tokens k.
"""

import functools
import json
import math
import re
from typing import NamedTuple
import zlib

import jax
from jax.nn.initializers import lecun_normal, normal, ones, xavier_uniform as xavier, zeros
import jax.numpy as jnp
import numpy as np

# --- Sizes and parameters ---

# name: (D width, number of blocks, M MLP width, N heads)
VARIANTS = {
    "demo": (64, 4, 256, 1),  # ours, for the demo; all others are published
    "mu": (32, 1, 128, 2),
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "M": (512, 12, 2048, 8),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "H": (1280, 32, 5120, 16),
}
CHOICES = {
    "posemb": ("sincos2d", "learned"),  # a constant, or an array
    "pool": ("gap", "cls"),  # classify the mean of the tokens, or one more token
    "head": ("mlp", "linear"),  # one hidden tanh layer, or none
    "dtype": ("bfloat16", "float32"),
}


class WeightsError(ValueError):
  """A file or a `Config` that is not what was expected."""


class DamagedError(WeightsError):
  """A file whose bytes are wrong."""


class Config(NamedTuple):
  """A model's size and options; flags of the same names set them."""

  variant: str = "S/16"  # a key of VARIANTS and the patch side P
  image_size: int = 224  # I, in pixels
  posemb: str = "sincos2d"
  pool: str = "gap"
  head: str = "mlp"
  num_classes: int = 1000  # C; 0: a file without a head
  dtype: str = "bfloat16"  # see "Arithmetic"

  @property
  def sizes(self):
    """(P, D, number of blocks, M, N)."""
    name, patch = self.variant.split("/")
    return int(patch), *VARIANTS[name]


def check_config(config):
  """WeightsError: a field has no value that is known."""
  name, _, patch = config.variant.partition("/")
  if name not in VARIANTS or not re.fullmatch("[1-9][0-9]*", patch):
    raise WeightsError(f"--variant={config.variant}: expected one of {', '.join(VARIANTS)} / a "
                       "patch side, such as S/16")
  if config.image_size < int(patch) or config.image_size % int(patch):
    raise WeightsError(f"--image_size={config.image_size}: expected a multiple of {patch}")
  for field, known in CHOICES.items():
    if getattr(config, field) not in known:
      raise WeightsError(f"--{field}={getattr(config, field)}: expected {' or '.join(known)}")


def parameter_table(config=Config()):
  """{name: (shape, initialiser)}, in the order of the layers; WeightsError: `check_config`'s."""
  check_config(config)
  P, D, blocks, M, N = config.sizes
  H, patches, C = D // N, (config.image_size // P) ** 2, config.num_classes
  lecun = lecun_normal()  # fan-in P*P*3 for the patches, D for a matrix
  # Query, key, value and out are D x D matrices, bounded by sqrt(6 / 2D), in S 0.088. By default,
  # the first axis of three would count as a receptive field: 0.015 (of out 0.047).
  to_heads, from_heads = xavier(in_axis=0, out_axis=(1, 2)), xavier(in_axis=(0, 1), out_axis=2)

  table = {}

  def layer(name, kernel_shape, init_kernel, init_bias=zeros, bias_axes=1):
    table[f"{name}/kernel"] = kernel_shape, init_kernel
    table[f"{name}/bias"] = kernel_shape[-bias_axes:], init_bias  # one for each output

  def norm(name):
    table[f"{name}/scale"], table[f"{name}/bias"] = ((D,), ones), ((D,), zeros)

  layer("embedding", (P, P, 3, D), lecun)
  if config.posemb == "learned":
    table["pos_embedding"] = (1, patches, D), normal(1 / math.sqrt(D))
  if config.pool == "cls":
    table["cls"] = (1, 1, D), zeros
  for i in range(blocks):
    name = f"Transformer/encoderblock_{i}"
    norm(f"{name}/LayerNorm_0")
    for projection in ("query", "key", "value"):
      layer(f"{name}/MultiHeadDotProductAttention_0/{projection}", (D, N, H), to_heads, bias_axes=2)
    layer(f"{name}/MultiHeadDotProductAttention_0/out", (N, H, D), from_heads)
    norm(f"{name}/LayerNorm_1")
    layer(f"{name}/MlpBlock_0/Dense_0", (D, M), xavier(), normal(1e-6))
    layer(f"{name}/MlpBlock_0/Dense_1", (M, D), xavier(), normal(1e-6))
  norm("Transformer/encoder_norm")
  if config.head == "mlp":
    layer("pre_logits", (D, D), lecun)
  if C:
    layer("head", (D, C), zeros)  # zero, so that the first loss is exactly log(C)
  return table


def init_params(seed, config=Config()):
  """A nested dict of float32 arrays, each drawn from the seed and its own name alone."""
  key = jax.random.key(seed)
  return unflatten({name: init(jax.random.fold_in(key, zlib.crc32(name.encode())), shape)
                    for name, (shape, init) in parameter_table(config).items()})


def flatten(tree):
  """{"head": {"bias": x}} -> {"head/bias": x}, for any tree."""
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(flat):
  """{"head/bias": x} -> {"head": {"bias": x}}."""
  tree = {}
  for name, leaf in flat.items():
    *parents, last = name.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


# --- Arithmetic ---

# With --dtype=bfloat16, these are bfloat16: inputs and outputs of the products in the embedding and
# the blocks, and what lies between them (queries, keys, values, attention's probabilities, GELU).
# These are float32: parameters and their gradients, the sums in a product, the residual stream,
# LayerNorm, softmax, and all from the last LayerNorm on. With --dtype=float32 all is; "highest"
# keeps TPUs and recent GPUs from rounding the inputs of its products.


def dense(equation, p, x):
  """`einsum(equation, x, kernel) + bias` in the type of x; parameters get float32 gradients."""
  if x.dtype == jnp.float32:
    return jnp.einsum(equation, x, p["kernel"], precision="highest") + p["bias"]
  return (rounded_product(equation, x, p["kernel"]) + p["bias"]).astype(x.dtype)


# JAX would round a kernel's gradient as it rounds the kernel, to 8 significant bits (256 + 1 is 256
# there), and then add up the devices'. This derivative by hand keeps it float32.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def rounded_product(equation, x, kernel):
  """`einsum(equation, x, kernel)` in bfloat16, of x bfloat16 and a kernel float32, rounded here."""
  return jnp.einsum(equation, x, kernel.astype(x.dtype))


def _backward(equation, saved, gradient):
  """The gradients of x, in bfloat16, and of the kernel, in float32, from the product's."""
  (x, kernel), (left, right, out) = saved, re.split(",|->", equation)
  return (jnp.einsum(f"{out},{right}->{left}", gradient, kernel.astype(x.dtype)),
          jnp.einsum(f"{left},{out}->{right}", x, gradient, preferred_element_type=jnp.float32))


rounded_product.defvjp(
    lambda equation, x, kernel: (rounded_product(equation, x, kernel), (x, kernel)), _backward)


# --- Layers, in the order in which an image meets them ---


def forward(params, images, config=Config()):
  """Images in [-1, 1], [B, I, I, 3] of any float type -> logits [B, C] float32."""
  _, D, blocks, *_ = config.sizes
  x = embed(params, images, config)
  if config.pool == "cls":  # prepended after the positions are added: [cls] has none
    x = jnp.concatenate([jnp.broadcast_to(params["cls"], (len(x), 1, D)), x], 1)
  for i in range(blocks):
    x = block(params["Transformer"][f"encoderblock_{i}"], x, config)
  x = layer_norm(params["Transformer"]["encoder_norm"], x)
  x = x[:, 0] if config.pool == "cls" else x.mean(1)  # [B, D]
  if config.head == "mlp":
    x = jnp.tanh(dense("bd,de->be", params["pre_logits"], x))
  return dense("bd,do->bo", params["head"], x)


def embed(params, images, config):
  """Images [B, I, I, 3] -> tokens [B, L, D] float32: patches, with their positions."""
  P, D, *_ = config.sizes
  B, h, w = images.shape[0], images.shape[1] // P, images.shape[2] // P
  # A convolution of stride P is one matrix product over patches of i x j pixels.
  patches = images.astype(config.dtype).reshape(B, h, P, w, P, 3).swapaxes(2, 3)
  x = dense("byxijc,ijcd->byxd", params["embedding"], patches).reshape(B, h * w, D)
  return x + (params["pos_embedding"] if config.posemb == "learned" else sincos2d(h, w, D))


def sincos2d(h, w, D):
  """The fixed position embedding [h*w, D] float32, row by row (MoCo v3, arXiv 2104.02057)."""
  y, x = np.mgrid[:h, :w].reshape(2, -1, 1)
  omega = 10_000.0 ** (-np.arange(D // 4) / (D / 4 - 1))
  waves = [np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega)]
  return np.concatenate(waves, 1).astype(np.float32)


def block(p, x, config):
  """One pre-LN encoder block, [B, L, D] -> [B, L, D]. The residual stream x stays float32."""
  y = layer_norm(p["LayerNorm_0"], x).astype(config.dtype)
  x += attention(p["MultiHeadDotProductAttention_0"], y)
  y = layer_norm(p["LayerNorm_1"], x).astype(config.dtype)
  return x + mlp(p["MlpBlock_0"], y)


def layer_norm(p, x):
  """Normalises the last axis of x float32; eps is added to the variance (arXiv 1607.06450)."""
  return jax.nn.standardize(x, epsilon=1e-6) * p["scale"] + p["bias"]


def attention(p, x):
  """Multi-head self-attention, [B, L, D] -> [B, L, D]."""
  q, k, v = (dense("bld,dnh->blnh", p[name], x) for name in ("query", "key", "value"))
  fused = jax.default_backend() == "gpu" and x.dtype == jnp.bfloat16 and q.shape == k.shape
  y = fused_attention(q, k, v) if fused else plain_attention(q, k, v)
  return dense("blnh,nhd->bld", p["out"], y)


def plain_attention(q, k, v):
  """softmax(q k^T / sqrt(H)) v of [B, L, N, H]: [B, L, N, H]. Scores and softmax are float32."""
  # Not "highest" for bfloat16: the gradient of the scores is float32, so that it would be slow.
  precision = "highest" if q.dtype == jnp.float32 else "default"
  scores = jnp.einsum("bqnh,bknh->bnqk", q, k, precision=precision,
                      preferred_element_type=jnp.float32)
  probs = jax.nn.softmax(scores / math.sqrt(q.shape[-1])).astype(q.dtype)  # [B, N, L, L]
  return jnp.einsum("bnqk,bknh->bqnh", probs, v, precision=precision)


def fused_attention(q, k, v, implementation="cudnn"):
  """The same by cuDNN, for bfloat16 on NVIDIA GPUs: it stores no [L, L] matrix of scores."""
  B, L, *_ = q.shape
  odd = L % 2  # as with [cls]. cuDNN takes even L only: one token is added and left out
  q, k, v = (jnp.pad(x, ((0, 0), (0, odd), (0, 0), (0, 0))) for x in (q, k, v))
  lengths = jnp.full(B, L, jnp.int32) if odd else None
  return jax.nn.dot_product_attention(
      q, k, v, query_seq_lengths=lengths, key_value_seq_lengths=lengths,
      implementation=implementation)[:, :L]


def mlp(p, x):
  """Two layers around the tanh form of GELU (arXiv 1606.08415), [B, L, D] -> [B, L, D]."""
  x = dense("bld,dm->blm", p["Dense_0"], x)
  return dense("blm,md->bld", p["Dense_1"], jax.nn.gelu(x, approximate=True))


# --- Weights from a file ---


def load(path, **given):
  """Reads the weights in an .npz file: a checkpoint of ours, or a published one.

  given: fields of `Config` that must be so. Only dtype and image_size may differ from the file's; a
    learned position embedding is resampled for the latter.
  Returns params, a nested dict of float32 arrays; the `Config`, of 0 classes if there is no head;
    the names of the classes in the order of the logits, or ().
  WeightsError: no such file, another model, or arrays that are missing, unknown, of another shape,
    not floats or not finite: all are listed.
  """
  arrays = read_npz(path)
  prefix = next((p for p in ("params/", "opt/target/") if any(k.startswith(p) for k in arrays)), "")
  params = {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}
  try:
    stored = (Config(**json.loads(arrays["config"].item())) if "config" in arrays  # of train.py
              else config_of_shapes(params))
    config = stored._replace(**given)
    table = parameter_table(config)
  except (AttributeError, LookupError, TypeError, ValueError) as error:
    raise WeightsError(f"--init={path} is no ViT that this code knows: {error}") from None
  for field, old, new in zip(Config._fields, stored, config):
    if old != new and field not in ("image_size", "dtype"):
      raise WeightsError(f"--{field}={new} contradicts --init={path}, of {field}={old}")
  if "pos_embedding" in params and stored.image_size != config.image_size:
    params["pos_embedding"] = resample_posemb(params["pos_embedding"], table["pos_embedding"][0][1])
  wrong = [f"{name} missing" for name in table.keys() - params.keys()]
  wrong += [f"{name} unknown" for name in params.keys() - table.keys()]
  for name in table.keys() & params.keys():
    x, shape = params[name], table[name][0]
    if x.shape != shape or not jnp.issubdtype(x.dtype, jnp.floating):
      wrong.append(f"{name} {x.dtype} {x.shape}, expected floats {shape}")
    elif not np.isfinite(x.astype(np.float32)).all():
      wrong.append(f"{name} not finite")
  if wrong:
    raise WeightsError(f"--init={path} does not fit: {'; '.join(sorted(wrong))}")
  params = unflatten({name: x.astype(np.float32) for name, x in params.items()})
  return params, config, tuple(arrays.get("label_names", np.array(())).tolist())


def read_npz(path):
  """{name: array} of an .npz file, here or in gs://; nothing is unpickled.

  DamagedError: its bytes are wrong. WeightsError: they cannot be read.
  """
  open_file, unreadable = open, (OSError, MemoryError)
  if "://" in path:
    import tensorflow as tf  # pylint: disable=g-import-not-at-top
    open_file, unreadable = tf.io.gfile.GFile, (*unreadable, tf.errors.OpError)
  try:
    with open_file(path, "rb") as file, np.load(file) as npz:
      arrays = {name: npz[name] for name in npz.files}
  except unreadable as error:
    raise WeightsError(f"{path} cannot be read: {error!r}") from None
  except Exception as error:  # of zipfile and numpy
    raise DamagedError(f"{path} is no whole .npz file: {error}") from None
  # numpy writes bfloat16 as two raw bytes, "V2".
  return {name: x.view(jnp.bfloat16) if x.dtype == "V2" else x for name, x in arrays.items()}


def config_of_shapes(params):
  """The Config that the shapes of published parameters, {name: array}, show."""
  P, _, _, D = params["embedding/kernel"].shape
  M, = params["Transformer/encoderblock_0/MlpBlock_0/Dense_0/bias"].shape
  N, _ = params["Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/bias"].shape
  L = params["pos_embedding"].shape[1] if "pos_embedding" in params else 0
  C, = params["head/bias"].shape if "head/bias" in params else (0,)
  blocks = len({name.split("/")[1] for name in params if "/encoderblock_" in name})
  names = {sizes: name for name, sizes in VARIANTS.items()}
  return Config(f"{names[D, blocks, M, N]}/{P}", math.isqrt(L) * P or Config().image_size,
                "learned" if L else "sincos2d", "cls" if "cls" in params else "gap",
                "mlp" if "pre_logits/kernel" in params else "linear", C)


def resample_posemb(posemb, L):
  """A learned position embedding [1, h*h, D] for another L: bilinear, corners aligned."""
  old, new = math.isqrt(posemb.shape[1]), math.isqrt(L)
  grid, at = posemb.reshape(old, old, -1), np.linspace(0, old - 1, new)
  for axis in (0, 1):
    grid = np.apply_along_axis(lambda x: np.interp(at, np.arange(old), x), axis, grid)
  return grid.reshape(1, L, -1).astype(np.float32)
