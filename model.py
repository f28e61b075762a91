"""The plain Vision Transformer of "Better plain ViT baselines for ImageNet-1k" (arXiv 2205.01580).

A model is two things: its parameters, a nested dict of float32 arrays named as in the published
checkpoints, and a `Config`, which says what those arrays cannot. `forward` takes both.

Shapes: B batch, I image side, P patch side, L tokens, D width, N heads, H head dim (D = N*H), M MLP
width, C classes. In einsums they are lower case; y and x are rows and columns of patches, i and j
those of pixels in a patch, c the three colours, e another D.
"""

import functools
import json
import math
import re
from typing import NamedTuple
import zlib

import jax
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
  """A file or a model that is not what was expected."""


class Config(NamedTuple):
  """What a model is beside its arrays. A flag of train.py with a field's name is that field."""

  variant: str = "S/16"  # a key of VARIANTS and the patch side P
  image_size: int = 224  # I, in pixels
  posemb: str = "sincos2d"
  pool: str = "gap"
  head: str = "mlp"
  num_classes: int = 1000  # C; 0: a file without a head
  dtype: str = "bfloat16"  # of products before the head and of what lies between them

  @property
  def sizes(self):
    """(P, D, number of blocks, M, N); WeightsError if a field is none of those that are known."""
    name, _, patch = self.variant.partition("/")
    if name not in VARIANTS or not re.fullmatch("[1-9][0-9]*", patch):
      raise WeightsError(f"--variant={self.variant}: expected one of {', '.join(VARIANTS)} / a "
                         "patch side, such as S/16")
    P = int(patch)
    if self.image_size < P or self.image_size % P:
      raise WeightsError(f"--image_size={self.image_size}: expected a multiple of the patch, {P}")
    for field, known in CHOICES.items():
      if getattr(self, field) not in known:
        raise WeightsError(f"--{field}={getattr(self, field)}: expected {' or '.join(known)}")
    return P, *VARIANTS[name]


def parameter_table(config=Config()):
  """{name: (shape, initialiser)}, in the order of the layers; WeightsError as of `config.sizes`."""
  P, D, blocks, M, N = config.sizes
  H, patches, C = D // N, (config.image_size // P) ** 2, config.num_classes
  initializers = jax.nn.initializers
  zeros, ones, normal = initializers.zeros, initializers.ones, initializers.normal
  xavier = initializers.xavier_uniform
  lecun = initializers.lecun_normal()  # fan-in P*P*3 for the patches, D for a matrix
  # Query, key, value and out are D x D matrices, bounded by sqrt(6 / 2D) = 0.088. With the default
  # axes, the first would be a receptive field, and the bound 0.015 (of out 0.047).
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
  """{"head": {"bias": x}} -> {"head/bias": x}, for any tree: the published checkpoints' names."""
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


# --- Layers, in the order in which an image meets them ---


def forward(params, images, config=Config()):
  """Images in [-1, 1], [B, I, I, 3] of any float type -> logits [B, C] float32.

  Embedding and blocks are in `config.dtype`; residual stream, LayerNorm, softmax, head in float32.
  """
  _, _, blocks, *_ = config.sizes
  x = embed(params, images, config)
  for i in range(blocks):
    x = block(params["Transformer"][f"encoderblock_{i}"], x, config)
  x = layer_norm(params["Transformer"]["encoder_norm"], x)
  x = x[:, 0] if config.pool == "cls" else x.mean(1)  # [B, D]
  if config.head == "mlp":
    x = jnp.tanh(dense("bd,de->be", params["pre_logits"], x))
  return dense("bd,dc->bc", params["head"], x)


def embed(params, images, config):
  """Images [B, I, I, 3] -> tokens [B, L, D] float32: patches, their positions, perhaps [cls]."""
  P, D, *_ = config.sizes
  B, h, w = images.shape[0], images.shape[1] // P, images.shape[2] // P
  # A convolution of stride P is one matrix product over patches of i x j pixels and c colours.
  patches = images.astype(config.dtype).reshape(B, h, P, w, P, 3).swapaxes(2, 3)
  x = dense("byxijc,ijcd->byxd", params["embedding"], patches).reshape(B, h * w, D)
  x += params["pos_embedding"] if config.posemb == "learned" else sincos2d(h, w, D)
  if config.pool == "cls":  # prepended after the positions are added: [cls] has none
    x = jnp.concatenate([jnp.broadcast_to(params["cls"], (B, 1, D)), x], 1)
  return x


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
  """Normalises the last axis of x float32, with eps 1e-6 (Ba et al., arXiv 1607.06450)."""
  return jax.nn.standardize(x, epsilon=1e-6) * p["scale"] + p["bias"]


def attention(p, x):
  """Multi-head self-attention, [B, L, D] -> [B, L, D]."""
  q, k, v = (dense("bld,dnh->blnh", p[name], x) for name in ("query", "key", "value"))
  if jax.default_backend() == "gpu" and x.dtype == jnp.bfloat16:
    y = fused_attention(q, k, v)
  else:
    probs = recomputed(attention_probs, x)(q, k)
    y = jnp.einsum("bnqk,bknh->bqnh", probs, v, precision="highest")
  return dense("blnh,nhd->bld", p["out"], y)


def attention_probs(q, k):
  """softmax(q k^T / sqrt(H)) of [B, L, N, H], computed in float32: [B, N, L, L]."""
  # As scores are float32, so are the derivatives' products: "highest" would make them slow.
  precision = "highest" if q.dtype == jnp.float32 else "default"
  scores = jnp.einsum("bqnh,bknh->bnqk", q, k, precision=precision,
                      preferred_element_type=jnp.float32)
  return jax.nn.softmax(scores / math.sqrt(q.shape[-1])).astype(q.dtype)


def fused_attention(q, k, v, implementation="cudnn"):
  """softmax(q k^T / sqrt(H)) v of bfloat16 on NVIDIA GPUs: cuDNN stores no [L, L] matrix."""
  B, L, *_ = q.shape
  odd = L % 2  # as with [cls]. cuDNN takes even numbers only: one token is added and left out
  q, k, v = (jnp.pad(x, ((0, 0), (0, odd), (0, 0), (0, 0))) for x in (q, k, v))
  lengths = jnp.full(B, L, jnp.int32) if odd else None
  return jax.nn.dot_product_attention(
      q, k, v, query_seq_lengths=lengths, key_value_seq_lengths=lengths,
      implementation=implementation)[:, :L]


def mlp(p, x):
  """Two layers around the tanh form of GELU (arXiv 1606.08415), [B, L, D] -> [B, L, D]."""
  x = dense("bld,dm->blm", p["Dense_0"], x)
  x = recomputed(jax.nn.gelu, x)(x)  # which is the tanh form by default
  return dense("blm,md->bld", p["Dense_1"], x)


def recomputed(function, x):
  """The function; float32 computes it again for its gradient: on a CPU, keeping is slower."""
  return jax.checkpoint(function) if x.dtype == jnp.float32 else function


def dense(equation, p, x):
  """`einsum(equation, x, kernel) + bias` in the type of x; parameters get float32 gradients."""
  if x.dtype == jnp.float32:  # which TPUs and recent GPUs would round, but for "highest"
    return jnp.einsum(equation, x, p["kernel"], precision="highest") + p["bias"]
  return (rounded_product(equation, x, p["kernel"]) + p["bias"]).astype(x.dtype)


# bfloat16 has 8 significant bits: 256 + 1 is 256. Autodiff would round a kernel's gradient to it
# before the devices add up theirs. Hence this derivative by hand, which leaves it float32.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def rounded_product(equation, x, kernel):
  """`einsum(equation, x, kernel)` of x bfloat16 and a kernel float32, which is rounded for it."""
  return jnp.einsum(equation, x, kernel.astype(x.dtype))


def _rounded_product_backward(equation, inputs, gradient):
  (x, kernel), (left, right, out) = inputs, re.split(",|->", equation)
  return (jnp.einsum(f"{out},{right}->{left}", gradient, kernel.astype(x.dtype)),
          jnp.einsum(f"{left},{out}->{right}", x, gradient, preferred_element_type=jnp.float32))


rounded_product.defvjp(
    lambda equation, x, kernel: (rounded_product(equation, x, kernel), (x, kernel)),
    _rounded_product_backward)


# --- Weights from a file ---


def load(path, **given):
  """Reads weights from an .npz file: a checkpoint of ours, or a published one.

  Args:
    given: fields of `Config` that must be so. Only image_size, num_classes and dtype may differ
      from the file's; a learned position embedding is resampled for the image size.

  Returns:
    params, a nested dict of float32 arrays; the `Config`, with 0 classes if there is no head; the
    names of the classes in the order of the logits, or ().

  Raises:
    WeightsError: no such file, another model, or arrays that are missing, unknown, of another
      shape, not floats or not finite: all are listed.
  """
  arrays = read_npz(path)
  prefix = next((p for p in ("params/", "opt/target/") if any(k.startswith(p) for k in arrays)), "")
  params = {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}
  try:
    stored = config_of_checkpoint(arrays) if "flags" in arrays else config_of_shapes(params)
    config = stored._replace(**given)
    table = parameter_table(config)
  except (AttributeError, LookupError, TypeError, ValueError) as error:
    raise WeightsError(f"--init={path}: no ViT in it that this code knows ({error})") from None
  for field, old, new in zip(Config._fields, stored, config):
    if old != new and field not in ("image_size", "num_classes", "dtype"):
      raise WeightsError(f"--{field}={new} contradicts --init={path}, which holds {field}={old}")
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
  return params, config, tuple(arrays["label_names"].tolist() if "label_names" in arrays else ())


def read_npz(path):
  """{name: array} of an .npz file, here or in gs://. Nothing is unpickled.

  bfloat16, which numpy stores as two raw bytes, is bfloat16 again. WeightsError: it cannot be read.
  """
  try:
    if "://" in path:
      import tensorflow as tf  # pylint: disable=g-import-not-at-top
      file = tf.io.gfile.GFile(path, "rb")
    else:
      file = open(path, "rb")
    with file, np.load(file) as npz:
      arrays = {name: npz[name] for name in npz.files}
  except Exception as error:  # of the file system, zipfile or numpy
    raise WeightsError(f"{path} is no .npz file that can be read: {error}") from None
  return {name: x.view(jnp.bfloat16) if x.dtype == "V2" else x for name, x in arrays.items()}


def config_of_checkpoint(arrays):
  """The Config that a checkpoint of train.py states. TypeError: a field of another code matters."""
  if "config" not in arrays:  # as in the first version, whose flags said it
    said = json.loads(arrays["flags"].item()) | {"num_classes": len(arrays["label_names"])}
    return Config(**{field: said[field] for field in said.keys() & Config._fields})
  said = json.loads(arrays["config"].item())
  defaults = json.loads(arrays["defaults"].item()) if "defaults" in arrays else {"attention": "xla"}
  return Config(**{field: value for field, value in said.items()  # but for unknown ones at default
                   if field in Config._fields or value != defaults.get(field)})


def config_of_shapes(params):
  """The Config that the shapes of published parameters, {name: array}, show."""
  P, _, _, D = params["embedding/kernel"].shape
  M, = params["Transformer/encoderblock_0/MlpBlock_0/Dense_0/bias"].shape
  N, _ = params["Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/bias"].shape
  L = params["pos_embedding"].shape[1] if "pos_embedding" in params else 0
  C, = params["head/bias"].shape if "head/bias" in params else (0,)
  sizes = D, sum(name.endswith("/query/bias") for name in params), M, N
  for name, known in VARIANTS.items():
    if known == sizes:
      return Config(f"{name}/{P}", math.isqrt(L) * P or Config().image_size,
                    "learned" if L else "sincos2d", "cls" if "cls" in params else "gap",
                    "mlp" if "pre_logits/kernel" in params else "linear", C)
  raise ValueError(f"{sizes} is not in model.VARIANTS")


def resample_posemb(posemb, L):
  """A learned position embedding [1, h*h, D] for another square grid: bilinear, corners aligned."""
  old, new = math.isqrt(posemb.shape[1]), math.isqrt(L)
  grid, places = posemb.reshape(old, old, -1), np.linspace(0, old - 1, new)
  for axis in (0, 1):
    grid = np.apply_along_axis(lambda x: np.interp(places, np.arange(old), x), axis, grid)
  return grid.reshape(1, L, -1).astype(np.float32)
