"""Tests of everything, against values derived by hand or in float64 numpy: `python test_all.py [TestCase[.test]]`."""

import contextlib
import functools
import io
import itertools
import json
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from unittest import mock
import zipfile

from absl import flags
from absl.testing import absltest
from absl.testing import flagsaver
from absl.testing import parameterized

CACHE = tempfile.TemporaryDirectory()  # of what XLA compiles: many tests run the same few programs
os.environ |= {"JAX_COMPILATION_CACHE_DIR": CACHE.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

import jax

jax.config.update("jax_num_cpu_devices", 8)  # simulated; before anything uses them

import jax.numpy as jnp
import numpy as np
import optax
import tensorflow as tf
import tensorflow_datasets as tfds

import augment
import input_pipeline
import model
import train

HERE = os.path.dirname(os.path.abspath(__file__))
folder = tempfile.TemporaryDirectory
TINY = dict(variant="mu/8", image_size=16, num_classes=3)


def shapes_of(table):
  return {name: shape for name, (shape, _) in table.items()}


def random_params(seed=0, **kwargs):
  """Parameters that are nowhere zero, so that every one of them matters."""
  rng = np.random.default_rng(seed)
  table = model.parameter_table(**(TINY | kwargs))
  return model.unflatten({name: rng.normal(0, 0.3, shape).astype(np.float32) for name, (shape, _) in table.items()})


# --- model.py ---------------------------------------------------------------------------------------------------------


def numpy_forward(p, images, attention_probs=None):
  """The ViT in float64, written from the report with loops over pictures, patches and heads: images [B, I, I, 3].

  The attention of every head, [L, L] each, is appended to the list `attention_probs`.
  """
  f = {name: np.asarray(array, np.float64) for name, array in model.flatten(p).items()}

  def norm(name, x):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-6) * f[f"{name}/scale"] + f[f"{name}/bias"]

  def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)

  logits = []
  P, _, _, D = f["embedding/kernel"].shape
  for image in images.astype(np.float64):
    side = len(image) // P
    tokens = []
    for row, column in itertools.product(range(side), range(side)):
      patch = image[row * P:(row + 1) * P, column * P:(column + 1) * P]
      token = np.einsum("ijc,ijcd->d", patch, f["embedding/kernel"]) + f["embedding/bias"]
      if "pos_embedding" in f:
        token = token + f["pos_embedding"][0, row * side + column]
      else:
        omega = np.array([10000 ** (-i / (D // 4 - 1)) for i in range(D // 4)])
        token = token + np.concatenate([np.sin(column * omega), np.cos(column * omega), np.sin(row * omega),
                                        np.cos(row * omega)])
      tokens.append(token)
    x = np.stack(([f["cls"][0, 0]] if "cls" in f else []) + tokens)
    for i in range(sum(name.endswith("/query/bias") for name in f)):
      block = f"Transformer/encoderblock_{i}"
      attention = f"{block}/MultiHeadDotProductAttention_0"
      y, out = norm(f"{block}/LayerNorm_0", x), 0
      for n in range(f[f"{attention}/query/bias"].shape[0]):
        q, k, v = (y @ f[f"{attention}/{s}/kernel"][:, n] + f[f"{attention}/{s}/bias"][n] for s in ("query", "key", "value"))
        probs = softmax(q @ k.T / np.sqrt(q.shape[1]))
        out = out + probs @ v @ f[f"{attention}/out/kernel"][n]
        if attention_probs is not None:
          attention_probs.append(probs)
      x = x + out + f[f"{attention}/out/bias"]
      y = norm(f"{block}/LayerNorm_1", x) @ f[f"{block}/MlpBlock_0/Dense_0/kernel"] + f[f"{block}/MlpBlock_0/Dense_0/bias"]
      y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y ** 3)))
      x = x + y @ f[f"{block}/MlpBlock_0/Dense_1/kernel"] + f[f"{block}/MlpBlock_0/Dense_1/bias"]
    x = norm("Transformer/encoder_norm", x)
    x = x[0] if "cls" in f else x.mean(0)
    if "pre_logits/kernel" in f:
      x = np.tanh(x @ f["pre_logits/kernel"] + f["pre_logits/bias"])
    logits.append(x @ f["head/kernel"] + f["head/bias"])
  return np.stack(logits)


class ModelTest(parameterized.TestCase):

  @parameterized.parameters(
      ("sincos2d", "gap", "mlp", 22_122_472), ("sincos2d", "gap", "linear", 21_974_632),
      ("sincos2d", "cls", "mlp", 22_122_856), ("sincos2d", "cls", "linear", 21_975_016),
      ("learned", "gap", "mlp", 22_197_736), ("learned", "gap", "linear", 22_049_896),
      ("learned", "cls", "mlp", 22_198_120), ("learned", "cls", "linear", 22_050_280))
  def test_published_counts(self, posemb, pool, head, count):
    table = model.parameter_table("S/16", 224, posemb, pool, head, 1000)
    self.assertEqual(sum(map(math.prod, shapes_of(table).values())), count)

  def test_published_names_and_shapes(self):
    shapes = shapes_of(model.parameter_table(posemb="learned", pool="cls"))
    block = "Transformer/encoderblock_11/"
    expected = {
        "embedding/kernel": (16, 16, 3, 384), "embedding/bias": (384,), "pos_embedding": (1, 196, 384), "cls": (1, 1, 384),
        "Transformer/encoder_norm/scale": (384,), "Transformer/encoder_norm/bias": (384,), "pre_logits/kernel": (384, 384),
        "pre_logits/bias": (384,), "head/kernel": (384, 1000), "head/bias": (1000,)}
    expected |= {f"{block}LayerNorm_{j}/{kind}": (384,) for j in (0, 1) for kind in ("scale", "bias")}
    for kind in ("query", "key", "value"):
      expected[f"{block}MultiHeadDotProductAttention_0/{kind}/kernel"] = (384, 6, 64)
      expected[f"{block}MultiHeadDotProductAttention_0/{kind}/bias"] = (6, 64)
    expected |= {f"{block}MultiHeadDotProductAttention_0/out/kernel": (6, 64, 384),
                 f"{block}MultiHeadDotProductAttention_0/out/bias": (384,),
                 f"{block}MlpBlock_0/Dense_0/kernel": (384, 1536), f"{block}MlpBlock_0/Dense_0/bias": (1536,),
                 f"{block}MlpBlock_0/Dense_1/kernel": (1536, 384), f"{block}MlpBlock_0/Dense_1/bias": (384,)}
    self.assertEqual({name: shapes.get(name) for name in expected}, expected)
    self.assertLen(shapes, 10 + 12 * 16)

  def test_variants(self):
    for name, D, depth, M, N in (("mu", 32, 1, 128, 2), ("Ti", 192, 12, 768, 3), ("M", 512, 12, 2048, 8), ("B", 768, 12, 3072, 12),
                                 ("L", 1024, 24, 4096, 16), ("H", 1280, 32, 5120, 16)):
      shapes = shapes_of(model.parameter_table(f"{name}/32"))
      self.assertEqual(shapes["embedding/kernel"], (32, 32, 3, D))
      last = f"Transformer/encoderblock_{depth - 1}/"
      self.assertEqual(shapes[last + "MultiHeadDotProductAttention_0/query/kernel"], (D, N, D // N))
      self.assertEqual(shapes[last + "MlpBlock_0/Dense_0/kernel"], (D, M))
      self.assertNotIn(f"Transformer/encoderblock_{depth}/LayerNorm_0/scale", shapes)

  def test_initial_statistics(self):
    params = model.flatten(model.init_params(0, model.parameter_table(posemb="learned", pool="cls")))
    block = "Transformer/encoderblock_3/"
    for name in ("query", "key", "value", "out"):  # Xavier uniform of a 384 x 384 matrix
      kernel, bound = params[f"{block}MultiHeadDotProductAttention_0/{name}/kernel"], math.sqrt(6 / 768)
      self.assertLessEqual(abs(kernel).max(), bound)
      self.assertGreater(abs(kernel).max(), 0.999 * bound)
      self.assertAlmostEqual(kernel.std(), bound / math.sqrt(3), delta=2e-4)
    for name in ("Dense_0", "Dense_1"):
      kernel, bound = params[f"{block}MlpBlock_0/{name}/kernel"], math.sqrt(6 / (384 + 1536))
      self.assertLessEqual(abs(kernel).max(), bound)
      self.assertAlmostEqual(kernel.std(), bound / math.sqrt(3), delta=1e-4)
      self.assertAlmostEqual(params[f"{block}MlpBlock_0/{name}/bias"].std(), 1e-6, delta=1e-7)
    for name, fan_in in (("embedding", 768), ("pre_logits", 384)):  # cut at two standard deviations, then rescaled
      kernel, std = params[f"{name}/kernel"], math.sqrt(1 / fan_in)
      self.assertAlmostEqual(kernel.std(), std, delta=0.01 * std)
      self.assertAlmostEqual(abs(kernel).max(), 2 * std / 0.87962566, delta=0.01 * std)
    self.assertAlmostEqual(params["pos_embedding"].std(), 1 / math.sqrt(384), delta=5e-4)
    for name, array in params.items():
      self.assertEqual(array.dtype, jnp.float32)
      if name.endswith("scale"):
        np.testing.assert_array_equal(array, 1)
      elif name in ("cls", "head/kernel") or name.endswith("bias") and "MlpBlock" not in name:
        np.testing.assert_array_equal(array, 0)

  def test_initial_loss_is_log_of_classes(self):
    params = model.init_params(0, model.parameter_table("mu/16", 32))
    logits = model.forward(params, np.random.default_rng(0).normal(size=(2, 32, 32, 3)))
    loss = optax.softmax_cross_entropy(logits, jax.nn.one_hot(np.array([3, 999]), 1000))
    np.testing.assert_allclose(loss, math.log(1000), rtol=1e-6)

  def test_an_array_depends_on_seed_and_name_only(self):
    one = model.flatten(model.init_params(1, model.parameter_table("mu/16", 32)))
    other = model.flatten(model.init_params(1, model.parameter_table("mu/16", 64, "learned", "cls", "linear", 10)))
    for name in one.keys() & other.keys() - {"head/kernel", "head/bias"}:
      np.testing.assert_array_equal(one[name], other[name], name)
    query, key = (one[f"Transformer/encoderblock_0/MultiHeadDotProductAttention_0/{s}/kernel"] for s in ("query", "key"))
    self.assertGreater(abs(query - key).max(), 0.1)
    again = model.flatten(model.init_params(2, model.parameter_table("mu/16", 32)))
    self.assertGreater(abs(one["embedding/kernel"] - again["embedding/kernel"]).max(), 0.01)

  def test_sincos2d_by_hand(self):
    table = model.sincos2d(2, 3, 8)  # omega = 1, 1e-4
    np.testing.assert_allclose(table[0], [0, 0, 1, 1, 0, 0, 1, 1], atol=1e-7)
    expected = [math.sin(2), math.sin(2e-4), math.cos(2), math.cos(2e-4), math.sin(1), math.sin(1e-4), math.cos(1), math.cos(1e-4)]
    np.testing.assert_allclose(table[5], expected, atol=1e-7)  # row 1, column 2

  @parameterized.product(posemb=["sincos2d", "learned"], pool=["gap", "cls"], head=["mlp", "linear"])
  def test_forward_is_the_reports(self, posemb, pool, head):
    params = random_params(posemb=posemb, pool=pool, head=head)
    images = np.random.default_rng(1).uniform(-1, 1, (3, 16, 16, 3))
    logits = model.forward(params, images, jnp.float32)
    self.assertEqual((logits.shape, logits.dtype), ((3, 3), jnp.float32))
    np.testing.assert_allclose(logits, numpy_forward(params, images), rtol=2e-4, atol=2e-4)
    rounded = model.forward(params, images, jnp.bfloat16)
    self.assertEqual(rounded.dtype, jnp.float32)
    np.testing.assert_allclose(rounded, logits, atol=0.05)
    self.assertGreater(abs(rounded - logits).max(), 1e-6)

  def test_every_block_counts(self):
    with mock.patch.dict(model.VARIANTS, deep=(8, 12, 16, 2)):  # sorted names would put block 10 before block 2
      params = random_params(variant="deep/8")
    images = np.random.default_rng(1).uniform(-1, 1, (1, 16, 16, 3))
    np.testing.assert_allclose(model.forward(params, images, jnp.float32), numpy_forward(params, images), rtol=1e-3, atol=1e-3)

  @parameterized.parameters(jnp.float32, jnp.bfloat16)
  def test_einsum_and_its_gradient(self, dtype):
    rng = np.random.default_rng(0)
    x, w, g = (rng.normal(size=s).astype(np.float32) for s in ((2, 5, 7), (7, 3, 4), (2, 5, 3, 4)))
    out, pull = jax.vjp(lambda x, w: model.einsum("bld,dnh->blnh", x, w, dtype), x, w)
    x64, w64, g64 = (np.asarray(jnp.asarray(a, dtype), np.float64) for a in (x, w, g))  # rounded inputs, exact products
    for got, expected in zip((out, *pull(g)), (np.einsum("bld,dnh->blnh", x64, w64), np.einsum("blnh,dnh->bld", g64, w64),
                                               np.einsum("bld,blnh->dnh", x64, g64))):
      self.assertEqual(got.dtype, jnp.float32)
      np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)

  def test_gelu_and_its_gradient(self):
    x = np.array([-30, -5, -1, -1e-3, 0, 0.5, 3, 30])
    tanh_form = lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x ** 3)))  # in float64
    y, vjp = jax.vjp(model.gelu, jnp.float32(x))
    np.testing.assert_allclose(y, tanh_form(x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(vjp(jnp.full(8, 2.0))[0], (tanh_form(x + 1e-5) - tanh_form(x - 1e-5)) / 1e-5,
                               rtol=1e-5, atol=1e-5)  # float32 has no more of 1 + tanh(-4.5)

  def test_gradients_by_differences(self):
    params, images = random_params(), np.random.default_rng(1).uniform(-1, 1, (2, 16, 16, 3))
    loss = lambda p: model.forward(p, images, jnp.float32)[:, 0].sum()
    grads = model.flatten(jax.grad(loss)(params))
    remat = model.flatten(jax.grad(lambda p: model.forward(p, images, jnp.float32, remat=True)[:, 0].sum())(params))
    rng = np.random.default_rng(2)
    for name, array in model.flatten(params).items():
      np.testing.assert_allclose(remat[name], grads[name], rtol=1e-4, atol=1e-5)
      direction = rng.normal(size=array.shape)
      def moved(step):
        return numpy_forward(model.unflatten(model.flatten(params) | {name: array + step * direction}), images)[:, 0].sum()
      slope = (moved(1e-4) - moved(-1e-4)) / 2e-4
      self.assertAlmostEqual(slope, float((grads[name] * direction).sum()), delta=1e-3 * (1 + abs(slope)), msg=name)

  @parameterized.parameters("gap", "cls")
  def test_attention_map(self, pool):
    params, images, probs = random_params(pool=pool), np.random.default_rng(1).uniform(-1, 1, (2, 16, 16, 3)), []
    numpy_forward(params, images, probs)  # one block of two heads
    probs = np.mean(np.reshape(probs, (2, 2, *probs[0].shape)), 1)  # [B, queries, keys]
    expected = probs[:, 0, 1:] if pool == "cls" else probs.mean(1)
    np.testing.assert_allclose(model.attention_map(params, images), expected.reshape(2, 2, 2), rtol=1e-4)

  def test_flops_by_hand(self):
    # mu/8 at 16: 4 tokens; patches 192*32, q k v out 4*32*32, MLP 2*32*128, attention 2*4*4*32; pooled: 32*32 and 32*3.
    expected = 2 * (4 * 192 * 32 + 4 * 4 * 32 * 32 + 4 * 2 * 32 * 128 + 2 * 4 * 4 * 32 + 32 * 32 + 32 * 3)
    self.assertEqual(model.flops(model.parameter_table(**TINY), 16), expected)

  def test_fused_attention_of_a_gpu_is_wired_alike(self):
    """With XLA's attention in place of cuDNN's; an odd number of tokens must take the plain way."""
    fused = jax.nn.dot_product_attention
    used = []
    def stand_in(q, k, v, implementation):
      used.append((q.shape[1], implementation))
      return fused(q, k, v)
    images = np.random.default_rng(1).uniform(-1, 1, (3, 16, 16, 3))
    for pool in ("gap", "cls"):
      params = random_params(pool=pool)
      plain = model.forward(params, images)
      with mock.patch.object(jax, "default_backend", lambda: "gpu"), mock.patch.object(jax.nn, "dot_product_attention", stand_in):
        np.testing.assert_allclose(model.forward(params, images), plain, atol=0.03)
    self.assertEqual(used, [(4, "cudnn")])

  @parameterized.parameters(
      (dict(variant="XL/16"), "XL/16.*expected one of.*mu"), (dict(variant="S"), "such as S/16"), (dict(variant="S/0"), "such as S/16"),
      (dict(image_size=225), "225.*multiple of the patch size, 16"), (dict(image_size=8), "8.*multiple"),
      (dict(pool="max"), "max.*gap or cls"))
  def test_errors(self, kwargs, message):
    with self.assertRaisesRegex(ValueError, message):
      model.parameter_table(**kwargs)


# --- The method: schedule, optimiser, update --------------------------------------------------------------------------


def tiny_state(tx, seed=0, **kwargs):
  params = random_params(seed, **kwargs)
  return train.put_replicated({"params": params, "opt_state": tx.init(params), "step": np.int32(0)})


def tiny_batch(size=16, seed=0):
  rng = np.random.default_rng(seed)
  return {"images": rng.uniform(-1, 1, (size, 16, 16, 3)).astype(np.float32),
          "labels": rng.dirichlet(np.ones(3), size).astype(np.float32), "bad": 0}


class MethodTest(parameterized.TestCase):

  def test_schedule(self):
    total = round(90 * 1_268_355 / 1024)
    self.assertEqual(total, 111_477)
    schedule = train.make_schedule(10_000, total)
    last = 0.5 * (1 + math.cos(math.pi * (total - 1 - 10_000) / (total - 10_000)))
    for step, factor in ((0, 0), (5_000, 0.5), (10_000, 1), (10_000 + 101_477 / 2, 0.5), (10_000 + 101_477 / 4, 0.5 + math.sqrt(0.125)),
                         (total - 1, last), (total, 0)):
      self.assertAlmostEqual(float(schedule(step)), factor, delta=2e-7 if step != total - 1 else 1e-9)
    self.assertEqual(float(train.make_schedule(0, 10)(0)), 1)

  def test_the_defaults_are_the_paper(self):
    expected = dict(epochs=90, batch_size=1024, dataset="imagenet2012", train_split="train[:99%]", variant="S/16", image_size=224,
                    posemb="sincos2d", pool="gap", head="mlp", randaug_layers=2, randaug_magnitude=10, mixup=0.2, lr=1e-3,
                    weight_decay=1e-4, warmup_steps=10_000, grad_clip_norm=1, dtype="bfloat16", seed=0, init=None, grad_accum=1)
    self.assertEqual({name: flags.FLAGS[name].default for name in train.RECIPE}, expected)
    with open(train.__file__) as f:
      recipe_flags = re.findall(r'^flags.DEFINE_\w+\("(\w+)"', re.search("# The recipe\n(.*?)# The run\n", f.read(), re.S)[1], re.M)
    self.assertCountEqual(recipe_flags, train.RECIPE)
    self.assertEqual(train.EVALS, {
        "minival": (None, "train[99%:]", "label"), "val": (None, "validation", "label"),
        "real": ("imagenet2012_real", "validation", "real_label"), "v2": ("imagenet_v2", "test", "label")})

  def test_the_flags_reach_what_they_are_for(self):
    class Reached(Exception):
      pass
    with folder() as root, flagsaver.flagsaver(), mock.patch.object(input_pipeline, "open_dataset", lambda *_: NUMBERS), \
        mock.patch.object(train, "make_schedule") as make_schedule, mock.patch.object(train, "make_optimizer") as make_optimizer, \
        mock.patch.object(train, "restore_checkpoint", lambda _, state, *__: state), \
        mock.patch.object(train, "make_update") as make_update, mock.patch.object(model, "init_params") as init_params, \
        mock.patch.object(input_pipeline, "train_batches", side_effect=Reached) as train_batches:
      init_params.return_value = {"kernel": np.zeros(1)}
      make_optimizer.return_value.init.return_value = {}
      flags.FLAGS(["train.py", "--train_split=train[:80%]", "--batch_size=16", "--epochs=7", "--warmup_steps=5", "--lr=0.5",
                   "--weight_decay=0.25", "--grad_clip_norm=3", "--randaug_layers=1", "--randaug_magnitude=4", "--mixup=0.3",
                   "--variant=mu/8", "--image_size=24", "--seed=6", "--dtype=float32", "--grad_accum=2", "--remat", "--eval=train",
                   f"--workdir={root}", "--skip_bad_images"])
      with self.assertRaises(Reached):
        train.main([])
    make_schedule.assert_called_once_with(5, 18)  # 7 * 40 / 16 = 17.5
    make_optimizer.assert_called_once_with(make_schedule.return_value, 0.5, 0.25, 3)
    make_update.assert_called_once_with(make_optimizer.return_value, jnp.float32, grad_accum=2, remat=True)
    self.assertEqual(init_params.call_args.args[0], 6)
    train_batches.assert_called_once_with(
        NUMBERS, "train[:80%]", 16, start_step=0, image_size=24, randaug_layers=1, randaug_magnitude=4, mixup_p=0.3,
        dtype=jnp.float32, seed=6, process_index=0, process_count=1, skip_bad_images=True)

  def test_three_updates_against_float64(self):
    rng = np.random.default_rng(0)
    params = {"a": {"kernel": rng.normal(size=(4, 3)), "bias": rng.normal(size=3)}, "scale": rng.normal(size=2)}
    params = jax.tree.map(lambda x: x.astype(np.float32), params)
    factors = [0.0, 0.5, 1.0]
    tx = train.make_optimizer(lambda step: jnp.array(factors)[step], lr=0.01, weight_decay=0.1, grad_clip_norm=1.0)
    state = tx.init(params)
    expected = {name: x.astype(np.float64) for name, x in model.flatten(params).items()}
    mu, nu = ({name: np.zeros_like(x) for name, x in expected.items()} for _ in range(2))
    for t, size in enumerate((10.0, 0.01, 3.0), 1):  # norm above, below and above 1
      grads = jax.tree.map(lambda x: (size * rng.normal(size=x.shape)).astype(np.float32), params)
      updates, state = tx.update(grads, state, params)
      params = optax.apply_updates(params, updates)
      flat = {name: x.astype(np.float64) for name, x in model.flatten(grads).items()}
      norm = math.sqrt(sum((x ** 2).sum() for x in flat.values()))
      for name, g in flat.items():
        g = g * min(1, 1 / norm)
        mu[name] = 0.9 * mu[name] + 0.1 * g
        nu[name] = 0.999 * nu[name] + 0.001 * g ** 2
        step = 0.01 * (mu[name] / (1 - 0.9 ** t)) / (np.sqrt(nu[name] / (1 - 0.999 ** t)) + 1e-8)
        step += 0.1 * expected[name] if name.endswith("kernel") else 0
        expected[name] = expected[name] - factors[t - 1] * step
        mu[name] = np.asarray(jnp.asarray(mu[name], jnp.bfloat16), np.float64)  # how it is stored
      if t == 1:
        self.assertEqual(max(abs(x).max() for x in model.flatten(updates).values()), 0)  # the first rate is 0
    for name, x in model.flatten(params).items():
      np.testing.assert_allclose(x, expected[name], atol=2e-4, err_msg=name)
    adam = next(s for s in state if hasattr(s, "mu"))
    self.assertEqual({x.dtype for x in jax.tree.leaves(adam.mu)}, {jnp.dtype(jnp.bfloat16)})
    self.assertEqual({x.dtype for x in jax.tree.leaves(adam.nu)}, {jnp.dtype(jnp.float32)})

  def test_decay_is_not_multiplied_by_the_rate_and_reaches_kernels_only(self):
    tx = train.make_optimizer(lambda _: 0.5, lr=0.0, weight_decay=1e-4)
    params = jax.tree.map(jnp.ones_like, random_params(posemb="learned", pool="cls"))
    updates, _ = tx.update(params, tx.init(params), params)
    for name, x in model.flatten(updates).items():
      np.testing.assert_allclose(x, -0.5e-4 if name.endswith("/kernel") else 0, rtol=1e-6, err_msg=name)

  def test_clipping_off(self):
    params = {"kernel": jnp.ones(2)}
    for clip, nu in ((1.0, 0.001 * 0.5), (0.0, 0.001 * 9)):
      tx = train.make_optimizer(lambda _: 1.0, grad_clip_norm=clip)
      _, state = tx.update({"kernel": jnp.full(2, 3.0)}, tx.init(params), params)
      np.testing.assert_allclose(next(s for s in state if hasattr(s, "nu")).nu["kernel"], nu, rtol=1e-5)

  def losses(self, devices=8, grad_accum=1, **kwargs):
    with mock.patch.object(jax, "devices", lambda d=jax.devices(): d[:devices]):
      tx = train.make_optimizer(train.make_schedule(0, 100))
      update, state = train.make_update(tx, jnp.float32, grad_accum, **kwargs), tiny_state(tx)
      losses = []
      with mock.patch.object(jax, "local_device_count", lambda: devices):
        for seed in range(3):
          state, metrics = update(state, train.put_batch(tiny_batch(seed=seed)))
          losses.append(metrics["loss"].item())
    return losses, jax.device_get(state["params"])

  def test_one_two_and_eight_devices_and_accumulation_agree(self):
    one, params = self.losses(devices=1)
    logits = numpy_forward(random_params(), tiny_batch()["images"])
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    self.assertAlmostEqual(one[0], -(tiny_batch()["labels"] * log_probs).sum(1).mean(), delta=1e-4)
    for kwargs in (dict(devices=2), dict(devices=8), dict(devices=2, grad_accum=4), dict(remat=True)):
      other, other_params = self.losses(**kwargs)
      np.testing.assert_allclose(other, one, rtol=2e-5, err_msg=str(kwargs))
      for name, x in model.flatten(other_params).items():
        np.testing.assert_allclose(x, model.flatten(params)[name], atol=5e-4, err_msg=name)

  def test_overfits_one_batch(self):
    tx = train.make_optimizer(train.make_schedule(10, 150), lr=3e-3)
    update, state, batch = train.make_update(tx, jnp.float32), tiny_state(tx), tiny_batch()
    batch["labels"] = np.eye(3, dtype=np.float32)[np.arange(16) % 3]
    for _ in range(150):
      state, metrics = update(state, train.put_batch(batch))
      loss = metrics["loss"].item()
    self.assertLess(loss, 0.02)

  def test_signals_of_all_processes_add_up(self):
    tx = train.make_optimizer(train.make_schedule(0, 100))
    with mock.patch.object(train, "received_signal", 15):
      _, metrics = train.make_update(tx, jnp.float32)(tiny_state(tx), train.put_batch(tiny_batch() | {"bad": 3}))
    self.assertEqual((metrics["bad"].item(), metrics["stop"].item()), (3, 15))

  def test_eval_step(self):
    params = random_params()
    images = np.random.default_rng(3).uniform(-1, 1, (8, 16, 16, 3)).astype(np.float32)
    logits = numpy_forward(params, images)
    order = logits.argsort(1)
    labels = np.zeros((8, 3), np.float32)
    labels[0, order[0, -1]] = 1  # right
    labels[1, order[1, -2]] = 1  # wrong
    labels[2, order[2, -2:]] = 1  # two right answers, one of them predicted
    labels[3, order[3, :2]] = 1  # two right answers, neither predicted
    metrics = train.make_eval_step(jnp.float32)(params, train.put_batch({"images": images, "labels": labels, "bad": 0}))
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    loss = -(log_probs[:4] * labels[:4]).sum(1) / labels[:4].sum(1)
    self.assertEqual([metrics[key].item() for key in ("count", "top1", "top5")], [4, 2, 4])
    self.assertAlmostEqual(metrics["loss"].item(), loss.sum(), delta=1e-4)


# --- augment.py -------------------------------------------------------------------------------------------------------


def numpy_op(name, image, magnitude, sign=1, center=(0, 0)):
  """The sixteen operations in float64, pixel by pixel as the recipe defines them."""
  x = image.astype(np.float64)
  H, W, _ = image.shape
  factor = 1.8 * magnitude / 10 + 0.1
  blend = lambda a, b: np.clip(a + factor * (b - a), 0, 255).astype(np.uint8)
  pixels = sign * 100 * magnitude / 10 * W / 224

  def sample(source):  # source(x, y) -> coordinates
    out = np.full_like(image, 128)
    for row, column in itertools.product(range(H), range(W)):
      sx, sy = (math.copysign(math.floor(abs(c) + 0.5), c) for c in source(column, row))
      if 0 <= sx < W and 0 <= sy < H:
        out[row, column] = image[int(sy), int(sx)]
    return out

  match name:
    case "auto_contrast":
      low, high = x.min((0, 1)), x.max((0, 1))
      stretched = (x - low) * 255 / np.maximum(high - low, 1)
      return np.where(high > low, np.clip(stretched + 1e-9, 0, 255).astype(np.uint8), image)
    case "equalize":
      out = image.copy()
      for c in range(3):
        h = np.bincount(image[..., c].ravel(), minlength=256)
        step = (h.sum() - h[h > 0][-1]) // 255
        if step:
          lut = np.clip(np.concatenate([[0], ((np.cumsum(h) + step // 2) // step)[:-1]]), 0, 255)
          out[..., c] = lut[image[..., c]]
      return out
    case "invert":
      return 255 - image
    case "rotate":
      a, cx, cy = math.radians(sign * 30 * magnitude / 10), (W - 1) / 2, (H - 1) / 2
      c, s = math.cos(a), math.sin(a)
      return sample(lambda px, py: (c * (px - cx) - s * (py - cy) + cx, s * (px - cx) + c * (py - cy) + cy))
    case "posterize":
      shift = 8 - int(4 * magnitude / 10)
      return (image.astype(int) >> shift << shift).astype(np.uint8)
    case "solarize":
      return np.where(image < int(256 * magnitude / 10) % 256, image, 255 - image)
    case "solarize_add":
      return np.where(image < 128, np.minimum(x + int(110 * magnitude / 10), 255), x).astype(np.uint8)
    case "color":
      grey = (x @ [0.2989, 0.5870, 0.1140] / 255 * 255.5).astype(np.uint8)[..., None]
      return blend(grey.astype(np.float64), x)
    case "contrast":
      return blend(196.0, x)
    case "brightness":
      return blend(0.0, x)
    case "sharpness":
      smooth = x.copy()
      for row, column in itertools.product(range(1, H - 1), range(1, W - 1)):
        around = x[row - 1:row + 2, column - 1:column + 2].sum((0, 1)) + 4 * x[row, column]
        smooth[row, column] = np.floor(around / 13)
      return blend(smooth, x)
    case "shear_x":
      return sample(lambda px, py: (px + sign * 0.3 * magnitude / 10 * py, py))
    case "shear_y":
      return sample(lambda px, py: (px, py + sign * 0.3 * magnitude / 10 * px))
    case "translate_x":
      return sample(lambda px, py: (px + pixels, py))
    case "translate_y":
      return sample(lambda px, py: (px, py + pixels))
    case "cutout":
      out, half = image.copy(), int(int(40 * magnitude / 10) * W / 224)
      for row, column in itertools.product(range(H), range(W)):
        if -half <= row - center[0] < half and -half <= column - center[1] < half:
          out[row, column] = 128
      return out


GEOMETRY = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


class AugmentTest(parameterized.TestCase):

  def by_hand(self, op, row, expected, *args):
    """Checks an operation on a picture of one grey row, repeated to three rows."""
    image = np.tile(np.array(row, np.uint8)[None, :, None], (3, 1, 3))
    np.testing.assert_array_equal(op(tf.constant(image), *args)[1, :, 0], expected)

  def test_pointwise_by_hand(self):
    row = [0, 1, 100, 127, 128, 200, 255]
    self.by_hand(augment.invert, row, [255, 254, 155, 128, 127, 55, 0])
    self.by_hand(augment.posterize, row, [0, 0, 96, 112, 128, 192, 240], 4)
    self.by_hand(augment.posterize, row, [0] * 7, 0)
    self.by_hand(augment.solarize, row, [0, 1, 100, 127, 127, 55, 0], 128)
    self.by_hand(augment.solarize, row, [255, 254, 155, 128, 127, 55, 0], 0)
    self.by_hand(augment.solarize_add, row, [110, 111, 210, 237, 128, 200, 255], 110)
    self.by_hand(augment.brightness, row, [0, 1, 190, 241, 243, 255, 255], 1.9)  # 1.9, 241.3, 243.2
    self.by_hand(augment.contrast, row, [0, 0, 13, 64, 66, 203, 255], 1.9)  # 196 + 1.9 (x - 196): 13.6, 64.9, 66.8, 203.6
    self.by_hand(augment.contrast, row, [196] * 7, 0.0)
    self.by_hand(augment.auto_contrast, [50, 60, 90, 100], [0, 51, 204, 255])
    self.by_hand(augment.auto_contrast, [50, 50, 50, 50], [50] * 4)

  def test_color_by_hand(self):
    image = tf.constant([[[255, 0, 0], [10, 20, 30]]], tf.uint8)  # grey 76 (76.37), 18 (18.19)
    # 76 + 1.9 (255 - 76) = 416, 76 - 144.4 < 0; 18 + 1.9 (10 - 18) = 2.8, 21.8, 40.8
    np.testing.assert_array_equal(augment.color(image, 1.9), [[[255, 0, 0], [2, 21, 40]]])
    np.testing.assert_array_equal(augment.color(image, 0.0), [[[76, 76, 76], [18, 18, 18]]])

  def test_sharpness_by_hand(self):
    image = np.full((3, 4, 3), 100, np.uint8)
    image[1, 1] = 113
    # Smoothed: (8 * 100 + 5 * 113) / 13 = 105 at the point, (12 * 100 + 113) / 13 = 101 beside it; 105 + 1.9 * 8 = 120.2,
    # 101 - 1.9 = 99.1; the border keeps what it is.
    expected = np.full((3, 4), 100)
    expected[1, 1:3] = [120, 99]
    np.testing.assert_array_equal(augment.sharpness(tf.constant(image), 1.9)[..., 0], expected)
    np.testing.assert_array_equal(augment.sharpness(tf.constant(image), 0.0)[1, :, 0], [100, 105, 101, 100])

  def test_equalize_by_hand(self):
    # 510 pixels: 255 of 10, 255 of 20. step = (510 - 255) // 255 = 1; table: below 10 0, above 10 255, above 20 510 -> 255.
    image = np.repeat(np.array([10, 20], np.uint8), 255 * 3).reshape(2, 255, 3)
    self.assertEqual(np.unique(augment.equalize(tf.constant(image))).tolist(), [0, 255])
    flat = tf.fill([20, 20, 3], tf.constant(7, tf.uint8))
    np.testing.assert_array_equal(augment.equalize(flat), flat)

  def test_geometry_by_hand(self):
    row = [10, 20, 30, 40]
    self.by_hand(augment.translate_x, row, [20, 30, 40, 128], 1.0)
    self.by_hand(augment.translate_x, row, [128, 128, 10, 20], -2.0)
    self.by_hand(augment.translate_x, row, [20, 30, 40, 128], 0.5)  # 0.5 -> 1, 1.5 -> 2: halves away from zero
    self.by_hand(augment.translate_x, row, [128, 20, 30, 40], -0.5)  # -0.5 -> -1, 0.5 -> 1, 1.5 -> 2, 2.5 -> 3
    self.by_hand(augment.shear_x, row, [20, 30, 40, 128], 1.0)  # row 1 of 3
    self.by_hand(augment.translate_y, row, [128] * 4, 2.0)
    square = np.arange(1, 10, dtype=np.uint8).reshape(3, 3, 1) * np.ones(3, np.uint8)
    np.testing.assert_array_equal(augment.shear_y(tf.constant(square), -1.0)[..., 0], [[1, 128, 128], [4, 2, 128], [7, 5, 3]])
    # out(x, y) = in(-y, x) about the centre: out's top row is in's right column... read from the left column upwards.
    np.testing.assert_array_equal(augment.rotate(tf.constant(square), 90.0)[..., 0], [[3, 6, 9], [2, 5, 8], [1, 4, 7]])

  def test_cutout_by_hand(self):
    out = augment.cutout(tf.zeros([5, 6, 3], tf.uint8), 1, tf.constant([0, 3]))[..., 0]
    expected = np.zeros((5, 6))
    expected[0, 2:4] = 128
    np.testing.assert_array_equal(out, expected)

  @parameterized.product(op=[op.__name__ for op in augment.OPS], magnitude=[0, 5, 10])
  def test_against_definitions(self, op, magnitude):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (56, 56, 3))
    smooth = np.asarray(tf.image.resize(rng.integers(0, 200, (5, 5, 3)), (56, 56), "bicubic")).clip(0, 255)
    center = (50, 11)
    for image, sign in ((noise, 1), (noise, -1), (smooth, 1)):
      image = image.astype(np.uint8)
      function = getattr(augment, op)
      given = augment.arguments(magnitude, float(sign), tf.constant(center), 56)[function]
      got = tf.function(function, jit_compile=True)(tf.constant(image), *given).numpy().astype(int)
      expected = numpy_op(op, image, magnitude, sign, center).astype(int)
      differs = (got != expected).any(-1)
      if op in GEOMETRY:
        self.assertLessEqual(differs.mean(), 0.005)
      elif op in ("auto_contrast", "color", "contrast", "brightness", "sharpness"):
        self.assertLessEqual(abs(got - expected).max(), 1)
        self.assertLess(differs.mean(), 0.05)
      else:
        np.testing.assert_array_equal(got, expected)

  def test_arguments_of_the_published_run(self):
    given = augment.arguments(10, -1.0, (3, 4), 224)
    expected = dict(rotate=-30, posterize=4, solarize=0, solarize_add=110, color=1.9, contrast=1.9, brightness=1.9, sharpness=1.9,
                    shear_x=-0.3, shear_y=-0.3, translate_x=-100, translate_y=-100, cutout=40)
    self.assertEqual({op.__name__: round(args[0], 9) for op, args in given.items() if args}, expected)
    self.assertEqual({op.__name__ for op in augment.OPS} - set(expected), {"auto_contrast", "equalize", "invert"})
    self.assertEqual(augment.arguments(10, 1.0, (3, 4), 112)[augment.cutout][0], 20)
    self.assertEqual(augment.arguments(5, 1.0, (3, 4), 112)[augment.translate_x][0], 25)
    self.assertEqual(augment.arguments(5, 1.0, (3, 4), 224)[augment.solarize][0], 128)

  def test_rand_augment_draws_every_op_sign_and_center_uniformly(self):
    def op(image, sign, center, number):
      drawn = [number, tf.cast(sign, tf.int32) + 1, center[0] * 8 + center[1]]
      return tf.cast(tf.broadcast_to(tf.stack(drawn), image.shape), tf.uint8)
    ops = tuple(functools.partial(op, number=i) for i in range(16))
    with mock.patch.object(augment, "OPS", ops), mock.patch.object(
        augment, "arguments", lambda magnitude, sign, center, size: {op: (sign, center) for op in ops}):
      def draw(i):
        return augment._compiled_layer.__wrapped__(77)(
            tf.zeros([4, 8, 3], tf.uint8), tf.random.stateless_uniform([4], [0, i], alg="philox"))[0, 0]
      draws = np.array(list(tf.data.Dataset.range(4800).map(draw).as_numpy_iterator()))
    for column, choices in ((0, 16), (2, 4 * 8)):  # the operation, the centre
      counts, mean = np.bincount(draws[:, column], minlength=choices), 4800 / choices
      self.assertLen(counts, choices)
      self.assertLess(((counts - mean) ** 2 / mean).sum(), {16: 45, 32: 70}[choices])  # chi square: p < 1e-4
    self.assertAlmostEqual((draws[:, 1] == 2).mean(), 0.5, delta=0.04)

  def test_rand_augment_applies_layers_to_the_given_magnitude(self):
    image = tf.constant(np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8))
    np.testing.assert_array_equal(augment.rand_augment(image, (1, 2)), augment.rand_augment(image, (1, 2)))
    different = {augment.rand_augment(image, (0, i), 2).numpy().tobytes() for i in range(40)}
    self.assertGreater(len(different), 30)
    # Two layers are one layer on what the other left.
    draws = tf.random.stateless_uniform([2, 4], (5, 6), alg="philox")
    one = augment._compiled_layer(10)(image, draws[0])
    np.testing.assert_array_equal(augment.rand_augment(image, (5, 6), 2), augment._compiled_layer(10)(one, draws[1]))

  def test_mixup(self):
    images = tf.constant(np.random.default_rng(0).uniform(-1, 1, (4, 2, 2, 3)), tf.float32)
    labels = tf.eye(4)
    mixed, mixed_labels = (x.numpy() for x in augment.mixup(images, labels, (3, 4), 0.2))
    a = mixed_labels[0, 0]
    self.assertBetween(a, 0.5, 1)
    np.testing.assert_allclose(mixed_labels, a * np.eye(4) + (1 - a) * np.roll(np.eye(4), 1, 0), atol=1e-6)
    np.testing.assert_allclose(mixed, a * images.numpy() + (1 - a) * np.roll(images, 1, 0), atol=1e-6)

  def test_mixup_proportions_at_small_p(self):
    proportion = lambda i: augment.mixup(tf.zeros([2, 1, 1, 1]), tf.eye(2), tf.stack([7, i]), 0.2)[1][0]
    a, b = np.array(list(tf.data.Dataset.range(100_000).map(proportion).as_numpy_iterator())).T
    self.assertTrue(np.isfinite(a).all())
    np.testing.assert_allclose(a + b, 1, atol=1e-6)
    self.assertGreaterEqual(a.min(), 0.5)
    beta = np.random.default_rng(0).beta(0.2, 0.2, 100_000)
    for q in (0.1, 0.3, 0.5, 0.7):
      self.assertAlmostEqual(np.quantile(a, q), np.quantile(np.maximum(beta, 1 - beta), q), delta=0.01)
    # Of two draws that both underflow even in float64, one is 1e+300 times the other all the same.
    self.assertGreater(min(float(augment.mixup(tf.zeros([2, 1]), tf.eye(2), (7, i), 1e-4)[1][0, 0]) for i in range(20)), 0.99)

  def test_contact_sheet(self):
    with folder() as root:
      path = os.path.join(root, "sheet.png")
      augment.draw_grid(path, [np.full((20, 100, 3), 9, np.uint8)] * 3, ["one", "two", "three"], columns=2)
      sheet = tf.io.decode_png(tf.io.read_file(path)).numpy()
    self.assertEqual(sheet.shape, (2 * 38, 2 * 104, 3))
    np.testing.assert_array_equal(sheet[14:34, 0:100], 9)
    self.assertGreater((sheet[:14] < 128).sum(), 20)  # captions


# --- input_pipeline.py ------------------------------------------------------------------------------------------------


class Numbers(tfds.core.GeneratorBasedBuilder):
  """50 + 13 noisy JPEGs of many shapes; the label is the number of the picture modulo 3, "many" holds 0 to 2 labels."""
  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    label = tfds.features.ClassLabel(names=["zero", "one", "two"])
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
        "image": tfds.features.Image(encoding_format="jpeg"), "label": label, "many": tfds.features.Sequence(label)}))

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(50), "validation": self._generate_examples(13)}

  def _generate_examples(self, count):
    rng = np.random.default_rng(count)
    for i in range(count):
      shape = (*rng.integers(20, 60, 2), 3)
      yield i, {"image": rng.integers(0, 256, shape).astype(np.uint8), "label": i % 3, "many": [[], [i % 3], [0, 2]][i % 3]}


def setUpModule():
  global DATA, NUMBERS
  DATA = tempfile.TemporaryDirectory()
  NUMBERS = Numbers(data_dir=DATA.name)
  NUMBERS.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=4))


def tearDownModule():
  DATA.cleanup()


def take(iterator, count):
  return list(itertools.islice(iterator, count))


def write_folder(root, files):
  """{"train/cat/1.png": bytes} -> a folder dataset."""
  for name, content in files.items():
    os.makedirs(os.path.join(root, os.path.dirname(name)), exist_ok=True)
    with open(os.path.join(root, name), "wb") as f:
      f.write(content)
  return root + "/"


def picture(size=(40, 30), mode="RGB", kind="JPEG", color=None):
  from PIL import Image
  out = io.BytesIO()
  Image.new(mode, size, color).save(out, kind)
  return out.getvalue()


class InputTest(parameterized.TestCase):

  def train_batches(self, batch_size=8, **kwargs):
    kwargs = dict(image_size=32, dtype=tf.float32, seed=3) | kwargs
    return input_pipeline.train_batches(NUMBERS, kwargs.pop("split", "train"), batch_size, **kwargs)

  def assert_same(self, a, b):
    self.assertEqual(a.keys(), b.keys())
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])

  @parameterized.parameters(7, 4096)
  def test_every_example_once_per_epoch_in_an_order_of_its_own(self, window):
    with mock.patch.object(input_pipeline, "WINDOW", window):
      ids = [x["id"].numpy() for x in input_pipeline.shuffled_records(NUMBERS, "train[:90%]", 0).take(3 * 45)]
      epochs = [ids[:45], ids[45:90], ids[90:]]
      for epoch in epochs:
        self.assertLen(set(epoch), 45)
        self.assertEqual(set(epoch), set(epochs[0]))
      self.assertNotEqual(epochs[0], epochs[1])
      self.assertNotEqual(epochs[0], sorted(epochs[0]))
      files = [re.search("-0000(.)-of-", name.decode())[1] for name in epochs[0][:20]]
      self.assertGreater(len(set(files)), 1)
      again = [x["id"].numpy() for x in input_pipeline.shuffled_records(NUMBERS, "train[:90%]", 0, start=100).take(35)]
      self.assertEqual(again, ids[100:])
      other = [x["id"].numpy() for x in input_pipeline.shuffled_records(NUMBERS, "train[:90%]", 1).take(45)]
      self.assertNotEqual(other, epochs[0])

  def test_splits(self):
    train_part, rest = (list(input_pipeline.read_records(NUMBERS, split)) for split in ("train[:90%]", "train[90%:]"))
    ids = [x["id"].numpy() for x in train_part + rest]
    self.assertEqual((len(train_part), len(rest), len(set(ids))), (45, 5, 50))
    self.assertEqual(input_pipeline.split_size(NUMBERS, "train[:90%]"), 45)
    for split in ("test", "train[:0]", "train[:101]", "tr ain"):
      with self.assertRaisesRegex(ValueError, r"unknown or empty; it has train \(50\), validation \(13\)"):
        input_pipeline.split_size(NUMBERS, split)

  def test_a_batch_is_a_function_of_its_number(self):
    batches = take(self.train_batches(), 14)  # two epochs and a bit
    self.assertEqual(batches[0]["images"].shape, (8, 32, 32, 3))
    self.assertLessEqual(abs(batches[0]["images"]).max(), 1 + 1e-6)
    np.testing.assert_allclose(batches[0]["labels"].sum(1), 1, rtol=1e-6)
    for start in (3, 6, 13):
      self.assert_same(batches[start], next(self.train_batches(start_step=start)))
    with mock.patch.object(input_pipeline, "THREADS", 1):
      for one, other in zip(batches, self.train_batches()):
        self.assert_same(one, other)
    self.assertGreater(abs(next(self.train_batches(seed=4))["images"] - batches[0]["images"]).max(), 0.1)

  @parameterized.parameters(2, 4)
  def test_processes_share_the_batches_of_one(self, count):
    whole = take(self.train_batches(), 3)
    shares = [take(self.train_batches(process_index=i, process_count=count), 3) for i in range(count)]
    for k, batch in enumerate(whole):
      for key in ("images", "labels"):
        np.testing.assert_array_equal(np.concatenate([share[k][key] for share in shares]), batch[key])

  def test_without_augmentation_labels_and_pictures_belong_together(self):
    batch = next(self.train_batches(batch_size=50, randaug_layers=0, mixup_p=0))
    records = list(input_pipeline.shuffled_records(NUMBERS, "train", 3).take(50))
    np.testing.assert_array_equal(batch["labels"].argmax(1), [x["label"].numpy() for x in records])
    self.assertEqual(set(np.unique(batch["labels"])), {0, 1})
    image = input_pipeline.train_image(records[7]["image"], 3, 7, 32, 0)
    np.testing.assert_allclose(batch["images"][7], image.numpy() / 127.5 - 1, atol=1e-6)

  def test_dtype_of_the_images(self):
    self.assertEqual(next(self.train_batches(dtype=jnp.bfloat16))["images"].dtype, jnp.bfloat16)

  def test_random_crops(self):
    """Area and aspect ratio of the boxes, from pictures whose pixels say where they are."""
    y, x = np.mgrid[:200, :250]
    png = tf.io.encode_png(np.stack([y, x, 0 * x], -1).astype(np.uint8))
    areas, ratios = [], []
    for i in range(300):
      crop = input_pipeline.decode_random_crop(png, (0, i)).numpy()
      self.assertEqual((np.ptp(crop[..., 0]) + 1, np.ptp(crop[..., 1]) + 1), crop.shape[:2])  # a box of the picture
      areas.append(crop.shape[0] * crop.shape[1] / (200 * 250))
      ratios.append(crop.shape[1] / crop.shape[0])
    self.assertBetween(min(areas), 0.049, 0.12)
    self.assertGreater(max(areas), 0.8)
    self.assertBetween(min(ratios), 0.74, 0.8)
    self.assertBetween(max(ratios), 1.25, 1.36)

  def test_fused_crop_is_decode_then_crop(self):
    y, x = np.mgrid[:120, :90]
    image = np.stack([y, x, y + x], -1).astype(np.uint8)
    jpeg = tf.io.encode_jpeg(image, quality=95)
    decoded = tf.io.decode_jpeg(jpeg).numpy()
    for i in range(5):
      expected = input_pipeline.decode_random_crop(tf.io.encode_png(decoded), (0, i)).numpy().astype(int)
      got = input_pipeline.decode_random_crop(jpeg, (0, i)).numpy()
      self.assertEqual(got.shape, expected.shape)
      # The decoder smooths colours across pixels, on the border of the box without those beyond it.
      np.testing.assert_allclose(got, expected, atol=3)
      np.testing.assert_array_equal(got[2:-2, 2:-2], expected[2:-2, 2:-2])

  def test_train_image_truncates_and_flips(self):
    gradient = np.repeat(np.arange(0, 240, 2, dtype=np.uint8)[None, :, None], 120, 0).repeat(3, 2)
    png = tf.io.encode_png(gradient)
    flips = 0
    for i in range(60):
      image = input_pipeline.train_image(png, 0, i, 32, 0).numpy()
      crop = input_pipeline.decode_random_crop(png, input_pipeline.seed_for("crops", 0, i)).numpy()
      # Bilinear without antialiasing: output pixel j reads at (j + 0.5) * width / 32 - 0.5.
      where = ((np.arange(32) + 0.5) * crop.shape[1] / 32 - 0.5).clip(0, crop.shape[1] - 1)
      row = np.floor(np.interp(where, np.arange(crop.shape[1]), crop[0, :, 0]) + 1e-4)
      flipped = image[0, 0, 0] > image[0, -1, 0]
      flips += flipped
      self.assertLessEqual(abs(image[5, :, 1].astype(int)[::-1 if flipped else 1] - row).max(), 1)
      self.assertLess((image[5, :, 1][::-1 if flipped else 1] != row).mean(), 0.1)
    self.assertBetween(flips, 18, 42)

  @parameterized.parameters((30, 40), (41, 33), (224, 224), (301, 300), (57, 500))
  def test_eval_image(self, H, W):
    """Shorter side to 37 = round(32 * 256 / 224) by area means, truncated, central 32 x 32."""
    image = np.random.default_rng(0).integers(0, 256, (H, W, 3)).astype(np.uint8)
    h, w = (round(side * 37 / min(H, W)) for side in (H, W))

    def area(n_in, n_out):  # the share of each input pixel in each output pixel
      edges = np.arange(n_out + 1) * n_in / n_out
      overlap = np.minimum(edges[1:, None], np.arange(1, n_in + 1)) - np.maximum(edges[:-1, None], np.arange(n_in))
      return overlap.clip(0) * n_out / n_in

    small = np.einsum("yh,xw,hwc->yxc", area(H, h), area(W, w), image.astype(np.float64))
    y, x = (h - 32) // 2, (w - 32) // 2
    got = input_pipeline.eval_image(tf.io.encode_png(image), 32).numpy().astype(int)
    expected = np.floor(small + 1e-3)[y:y + 32, x:x + 32]
    self.assertLessEqual(abs(got - expected).max(), 1)
    self.assertLess((got != expected).mean(), 0.05)  # 29.999 in float32 is truncated to 29

  @parameterized.product(batch_size=[4, 8, 16], count=[1, 2])
  def test_evaluation_counts_every_image_once(self, batch_size, count):
    shares = [list(input_pipeline.eval_batches(NUMBERS, "validation", batch_size, image_size=16, dtype=tf.float32,
                                               process_index=i, process_count=count)) for i in range(count)]
    self.assertEqual({len(share) for share in shares}, {-(-13 // batch_size)})
    batches = [np.concatenate([share[k]["images"] for share in shares]) for k in range(len(shares[0]))]
    labels = np.concatenate([share[k]["labels"] for k in range(len(shares[0])) for share in shares])
    images, counted = np.concatenate(batches), labels.any(1)
    np.testing.assert_array_equal(counted, [True] * 13 + [False] * (len(labels) - 13))
    records = list(input_pipeline.read_records(NUMBERS, "validation"))
    for image, label, record in zip(images, labels, records):
      np.testing.assert_allclose(image, input_pipeline.eval_image(record["image"], 16).numpy() / 127.5 - 1, atol=1e-6)
      self.assertEqual(np.flatnonzero(label), record["label"].numpy())

  def test_label_sets(self):
    batch, = input_pipeline.eval_batches(NUMBERS, "validation", 16, label="many", image_size=16)
    numbers = [x["label"].numpy() for x in input_pipeline.read_records(NUMBERS, "validation")]
    expected = np.array([[[0, 0, 0], [0, 1, 0], [1, 0, 1]][i] for i in numbers] + [[0, 0, 0]] * 3)
    np.testing.assert_array_equal(batch["labels"], expected)

  def test_folder_of_any_pictures(self):
    with folder() as root:
      name = write_folder(root, {
          "train/cat/a.jpg": picture(color=(200, 0, 0)), "train/cat/b.png": picture(mode="L", kind="PNG", color=100),
          "train/dog/c.png": picture(mode="RGBA", kind="PNG", color=(0, 200, 0, 50)),
          "train/dog/d.jpg": picture(mode="CMYK", color=(0, 255, 255, 0)), "train/dog/e.jpg": picture(mode="L", color=30)})
      builder = input_pipeline.open_dataset(name)
      self.assertEqual(builder.info.features["label"].names, ["cat", "dog"])
      self.assertEqual(input_pipeline.split_size(builder, "train[:60%]"), 3)
      colors = {}
      records = list(input_pipeline.read_records(builder, "train"))
      for record, batch in zip(records, input_pipeline.eval_batches(builder, "train", 1, image_size=16, dtype=tf.float32)):
        colors[os.path.basename(record["id"].numpy().decode())] = ((batch["images"][0, 8, 8] + 1) * 127.5).round().tolist()
      for file, color in (("a.jpg", (200, 0, 0)), ("b.png", (100,) * 3), ("c.png", (0, 200, 0)), ("d.jpg", (255, 0, 0)),
                          ("e.jpg", (30,) * 3)):
        np.testing.assert_allclose(colors[file], color, atol=3, err_msg=file)
      ids = [[x["id"].numpy() for x in input_pipeline.shuffled_records(builder, "train", 0).skip(5 * e).take(5)] for e in range(6)]
      self.assertEqual({len(set(epoch)) for epoch in ids}, {5})
      self.assertGreater(len(set(map(tuple, ids))), 1)
      batch = next(input_pipeline.train_batches(builder, "train", 4, image_size=16))
      self.assertEqual(batch["images"].shape, (4, 16, 16, 3))
      parts = [{x["id"].numpy() for x in input_pipeline.read_records(builder, s)} for s in ("train[:60%]", "train[60%:]")]
      self.assertEqual((len(parts[0]), len(parts[1]), len(parts[0] | parts[1])), (3, 2, 5))

  BAD = {
      "empty": b"", "text": b"no picture", "truncated.jpg": picture((300, 300))[:400],
      "truncated.png": picture((300, 300), kind="PNG")[:100],
      # 60,000 x 60,000 pixels declared in a few bytes
      "bomb.jpg": re.sub(b"(?<=\xff\xc0\0\x11\x08)....", b"\xea\x60" * 2, picture(), flags=re.S),
      "bomb.png": picture(kind="PNG")[:16] + (60_000).to_bytes(4, "big") * 2 + picture(kind="PNG")[24:],
  }

  @parameterized.parameters(*BAD)
  def test_bad_images(self, kind):
    with folder() as root:
      good = {f"train/c{i % 2}/{i}.jpg": picture(color=(40 * i, 0, 0)) for i in range(5)}
      bad = f"train/c0/{kind.split('.')[0]}.{kind.split('.')[-1] if '.' in kind else 'jpg'}"
      builder = input_pipeline.open_dataset(write_folder(root, good | {bad: self.BAD[kind]}))
      kwargs = dict(image_size=16, dtype=tf.float32)
      for batches in (input_pipeline.train_batches(builder, "train", 3, **kwargs),
                      input_pipeline.eval_batches(builder, "train", 4, **kwargs)):
        with self.assertRaisesRegex(input_pipeline.BadImage, f"bad record .*{bad}.*--skip_bad_images"):
          take(batches, 4)
      batches = take(input_pipeline.train_batches(builder, "train", 3, randaug_layers=0, mixup_p=0, skip_bad_images=True,
                                                  **kwargs), 20)
      self.assertEqual(sum(batch["bad"] for batch in batches), 10)  # 60 records are ten epochs of six
      for batch in batches:
        self.assertTrue((batch["labels"].sum(1) == 1).all())
        self.assertTrue((batch["images"][..., 1] < -0.9).all())  # no grey or zero image: all are red
      batches = list(input_pipeline.eval_batches(builder, "train", 4, skip_bad_images=True, **kwargs))
      self.assertEqual((sum(batch["bad"] for batch in batches), sum(batch["labels"].sum() for batch in batches)), (1, 5))

  def test_a_long_thin_picture_is_not_blown_up(self):
    with self.assertRaisesRegex(tf.errors.InvalidArgumentError, "image too large"):  # 256 x 15,360,000 pixels
      input_pipeline.eval_image(tf.io.encode_png(np.zeros((1, 60_000, 3), np.uint8)))

  def test_a_file_that_is_missing(self):
    with folder() as root:
      builder = input_pipeline.open_dataset(write_folder(root, {"train/c/1.png": picture(kind="PNG"), "train/c/2.png": b""}))
      os.remove(f"{root}/train/c/2.png")
      with self.assertRaisesRegex(input_pipeline.BadImage, "damaged or missing.*2.png"):
        list(input_pipeline.eval_batches(builder, "train", 2, image_size=16))

  def test_label_out_of_range(self):
    for label in (3, -1):
      with self.assertRaisesRegex(tf.errors.InvalidArgumentError, "label out of range"):
        input_pipeline._label_set(tf.constant(label, tf.int64), 3)

  def test_damaged_file(self):
    with folder() as root:
      builder = Numbers(data_dir=root)
      builder.download_and_prepare()
      path, = builder.data_path.glob("*train*")
      data = bytearray(path.read_bytes())
      data[len(data) // 2] ^= 255
      path.write_bytes(data)
      with self.assertRaisesRegex(input_pipeline.BadImage, "damaged.*corrupted record at [0-9]+.*prepare the dataset again"):
        take(input_pipeline.train_batches(builder, "train", 10, image_size=16), 5)

  def test_dataset_errors(self):
    with folder() as root:
      for name, message in (("imagenet2012", "not prepared in .*--manual_dir.*--dataset=patterns.*ILSVRC2012_img_train.tar"),
                            ("imagenette3", "no such dataset.*patterns"), ("./nowhere", "no such folder"), ("", "no such dataset"),
                            ("a b", "no such dataset"), ("cifar10:9.9.9", "no such dataset.*9.9.9.*version"),
                            ("glue/cola", "not prepared in .*--dataset=glue/cola"),
                            (root + "/", "no images")):
        with self.assertRaisesRegex(ValueError, message):
          input_pipeline.open_dataset(name, root)
      with self.assertRaisesRegex(input_pipeline.DatasetError, "--manual_dir=/nowhere: Manual directory.*ILSVRC2012_img_train.tar"):
        input_pipeline.open_dataset("imagenet2012", root, prepare=True, manual_dir="/nowhere")
      with mock.patch.object(input_pipeline.Patterns, "download_and_prepare", side_effect=[FileExistsError, None]) as prepare:
        with self.assertRaisesRegex(input_pipeline.DatasetError, "not prepared"):  # as the mock prepared nothing
          input_pipeline.open_dataset("patterns", root)  # another process was faster: looks again
      self.assertEqual(prepare.call_count, 2)
    with self.assertRaisesRegex(ValueError, "no classes in a feature 'name'; it has image, label, many"):
      input_pipeline.num_classes(NUMBERS, "name")
    self.assertEqual(input_pipeline.num_classes(NUMBERS, "many"), 3)

  def test_patterns(self):
    """Ten classes in equal parts, of many shapes; no class but the noise is ever without its two colours."""
    rng = np.random.default_rng(0)
    shapes = set()
    for name, pattern in input_pipeline.PATTERNS.items():
      for _ in range(20):
        image = input_pipeline._draw_pattern(rng, pattern)
        shapes.add(image.shape)
        self.assertEqual(image.dtype, np.uint8)
        self.assertGreater(image.std((0, 1)).max(), 20, name)
    self.assertGreater(len(shapes), 50)
    self.assertLen(input_pipeline.PATTERNS, 10)


# --- train.py: checkpoints, weights, runs -----------------------------------------------------------------------------


def npz_bytes(**arrays):
  out = io.BytesIO()
  np.savez(out, **arrays)
  return out.getvalue()


def noise_folder(root):
  """A folder dataset of noise in three classes; the class is the mean colour, so that it can be learnt."""
  rng = np.random.default_rng(0)
  files = {}
  for split, count in (("train", 40), ("validation", 13)):
    for i in range(count):
      image = rng.integers(0, 120, (30 + i, 40, 3))
      image[..., i % 3] += 100
      files[f"{split}/{('red', 'green', 'blue')[i % 3]}/{i}.png"] = tf.io.encode_png(image.astype(np.uint8)).numpy()
  return write_folder(os.path.join(root, "data"), files)


def flags_for(root, data, *more):
  return [f"--dataset={data}", f"--workdir={root}/run", "--variant=mu/8", "--image_size=16", "--batch_size=8", "--epochs=4",
          "--train_split=train", "--eval=validation", "--warmup_steps=2", "--dtype=float32", "--log_every=1",
          "--checkpoint_every=5", *more]


def run(*arguments):
  """`train.py` with these arguments, in this process: what it printed."""
  out = io.StringIO()
  handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
  with flagsaver.flagsaver(), contextlib.redirect_stdout(out), mock.patch.object(train, "received_signal", 0):
    flags.FLAGS(["train.py", *arguments])
    try:
      train.run([])
    except SystemExit as error:
      out.write(f"\nexit: {error.code}")
    finally:
      for number, handler in handlers.items():
        signal.signal(number, handler)
  return out.getvalue()


def losses(log):
  return dict(re.findall(r"^step (\d+)/.* loss (\S+) ", log, re.M))


def last_arrays(workdir):
  _, path = train.checkpoints(workdir)[-1]
  return train.read_npz(path)


class CheckpointTest(parameterized.TestCase):

  def state(self, seed=0, **kwargs):
    tx = train.make_optimizer(train.make_schedule(0, 10))
    params = random_params(seed, **kwargs)
    grads = jax.tree.map(lambda x: 0.1 * x, params)
    return jax.device_get({"params": params, "opt_state": tx.update(grads, tx.init(params), params)[1], "step": np.int32(seed)})

  def save(self, workdir, seed, recipe=None, **kwargs):
    extra = {"label_names": np.array(["a", "b"]), "flags": np.array(json.dumps(recipe or {"lr": 1}))}
    train.save_checkpoint(workdir, model.flatten(self.state(seed)) | extra, **kwargs)

  def restore(self, workdir, recipe=None, **kwargs):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
      state = train.restore_checkpoint(workdir, self.state(0), recipe or {"lr": 1}, **kwargs)
    return state, out.getvalue()

  def test_round_trip(self):
    with folder() as workdir:
      self.save(workdir, 7)
      state, said = self.restore(workdir)
      self.assertIn("Resuming after step 7", said)
      jax.tree.map(np.testing.assert_array_equal, state, self.state(7))
      same_types = jax.tree.map(lambda a, b: a.dtype == b.dtype, state, self.state(7))
      self.assertTrue(all(jax.tree.leaves(same_types)))
      self.assertIn(jnp.dtype(jnp.bfloat16), {x.dtype for x in jax.tree.leaves(state)})
      with np.load(train.checkpoints(workdir)[0][1]) as file:  # the two lines of the README
        np.testing.assert_array_equal(file["params/head/kernel"], self.state(7)["params"]["head"]["kernel"])
        self.assertEqual(file["label_names"].tolist(), ["a", "b"])

  def test_no_checkpoint(self):
    with folder() as workdir:
      self.assertEqual(int(self.restore(workdir)[0]["step"]), 0)

  def test_last_two_and_multiples_are_kept(self):
    with folder() as workdir:
      for step in range(1, 9):
        self.save(workdir, step, keep_every=3)
      self.assertEqual([step for step, _ in train.checkpoints(workdir)], [3, 6, 7, 8])
      self.save(workdir, 2)  # with later ones that are damaged, say
      self.assertEqual([step for step, _ in train.checkpoints(workdir)], [2, 7, 8])

  def test_a_workdir_that_looks_like_a_pattern(self):
    with folder() as root:
      workdir = f"{root}/run[1]*"
      os.makedirs(workdir)
      self.save(workdir, 5)
      open(f"{workdir}/checkpoint_old.npz", "w").close()
      self.assertEqual([step for step, _ in train.checkpoints(workdir)], [5])

  @parameterized.parameters("cut", "empty", "text", "flipped bit", "foreign", "pickle")
  def test_damaged_file_is_named_and_the_one_before_used(self, damage):
    with folder() as workdir:
      self.save(workdir, 1)
      self.save(workdir, 2)
      path = train.checkpoints(workdir)[-1][1]
      with open(path, "rb") as f:
        data = bytearray(f.read())
      data[len(data) // 2] ^= 1
      content = {"cut": bytes(data[:-100]), "empty": b"", "text": b"hello", "flipped bit": bytes(data),
                 "foreign": npz_bytes(step=np.array(2), flags=np.array("none")), "pickle": npz_bytes(step=np.array([{}], object))}[damage]
      with open(path, "wb") as f:
        f.write(content)
      state, said = self.restore(workdir)
      self.assertEqual(int(state["step"]), 1)
      self.assertRegex(said, f"{path}.*Trying the previous one.\n.*Resuming after step 1")
      os.remove(train.checkpoints(workdir)[0][1])
      with self.assertRaisesRegex(train.UserError, f"No checkpoint in {workdir} can be read; remove"):
        self.restore(workdir)

  def test_a_crash_at_any_byte_leaves_the_last_good_one(self):
    with folder() as workdir:
      self.save(workdir, 1)
      size = os.path.getsize(train.checkpoints(workdir)[0][1])
      for limit in (0, 1, size // 3, size - 1):
        with mock.patch.object(tf.io.gfile, "GFile", lambda path, mode, limit=limit: Crashing(path, mode, limit)):
          with self.assertRaises(OSError):
            self.save(workdir, 2)
        self.assertEqual(int(self.restore(workdir)[0]["step"]), 1)
        self.assertEqual(os.listdir(workdir), ["checkpoint_00000001.npz"])  # what was half written takes no place
      with mock.patch.object(tf.io.gfile, "rename", side_effect=OSError("power cut")), self.assertRaises(OSError):
        self.save(workdir, 2)
      self.assertEqual(int(self.restore(workdir)[0]["step"]), 1)
      self.save(workdir, 2)
      self.assertEqual(int(self.restore(workdir)[0]["step"]), 2)

  def test_a_full_disk_is_said_and_training_goes_on(self):
    with folder() as workdir, flagsaver.flagsaver(workdir=workdir), contextlib.redirect_stdout(io.StringIO()) as out:
      saver = train.AsyncCheckpointer({"flags": np.array(json.dumps({"lr": 1}))})
      saver.save(self.state(1))
      with mock.patch.object(np, "savez", side_effect=OSError(28, "No space left on device")):
        saver.save(self.state(2))
        saver.wait()
        self.assertIn("No space left on device", out.getvalue())
        self.assertIn("the previous one is kept", out.getvalue())
        saver.save(self.state(3))
        with self.assertRaisesRegex(train.UserError, "No space left"):
          saver.wait(last=True)
      self.assertEqual(int(self.restore(workdir)[0]["step"]), 1)

  def test_another_recipe_is_refused_with_the_difference(self):
    with folder() as workdir:
      self.save(workdir, 1, {"lr": 1, "seed": 5})
      self.assertEqual(int(self.restore(workdir, {"lr": 1, "seed": 5, "mixup": 0.2})[0]["step"]), 1)  # a flag added since
      with self.assertRaisesRegex(train.UserError, r"--mixup=0.2 \(now 0.3\)"):
        self.restore(workdir, {"lr": 1, "seed": 5, "mixup": 0.3})
      with self.assertRaisesRegex(train.UserError, r"--lr=1 \(now 2\).*--allow_changes"):
        self.restore(workdir, {"lr": 2, "seed": 5})
      state, _ = self.restore(workdir, {"lr": 2, "seed": 5}, allow_changes=True)
      self.assertEqual(int(state["step"]), 1)
      state["params"]["head"]["bias"] = np.zeros(4, np.float32)
      with self.assertRaisesRegex(train.UserError, "does not fit the model: params/head/bias missing, or of another shape"):
        train.restore_checkpoint(workdir, state, {"lr": 1, "seed": 5})

  @parameterized.parameters("object", "absurd shape", "absurd size", "bomb", "not numpy", "no header")
  def test_hostile_files_cost_nothing(self, kind):
    def npy(header, data=b""):
      header = header.encode().ljust(117) + b"\n"
      return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data
    content = {
        "object": npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", b"cos\nsystem\n(S'false'\ntR."),
        "absurd shape": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 9999)}"),
        "absurd size": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}", bytes(9)),
        "bomb": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (134217728,)}", bytes(2 ** 29)), "not numpy": b"x" * 200,
        "no header": npy("{'descr': '<f4', 'fortran_order'")}[kind]
    with folder() as root:
      path = os.path.join(root, "weights.npz")
      with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("params/head/kernel.npy", content)
      del content
      self.assertRegex(run(f"--init={path}", "--eval_only"), f"exit: Error: .*{path}" + ".*claim to be" * (kind == "bomb"))

  FLAVOURS = {
      "bare": lambda name, x: (name, x),
      "params/": lambda name, x: (f"params/{name}", x),
      "opt/target/": lambda name, x: (f"opt/target/{name}", x),
      "bfloat16": lambda name, x: (f"params/{name}", np.asarray(x, jnp.bfloat16)),
      "float16": lambda name, x: (name, x.astype(np.float16)),
      "old posemb": lambda name, x: (name.replace("pos_emb", "Transformer/posembed_input/pos_emb"), x),
  }

  @parameterized.product(flavour=[*FLAVOURS, "stacked"], posemb=["sincos2d", "learned"], head=["mlp", "linear"])
  def test_flavours(self, flavour, posemb, head):
    with mock.patch.dict(model.VARIANTS, two=(16, 2, 32, 2)), folder() as root, flagsaver.flagsaver():
      params = random_params(variant="two/8", posemb=posemb, head=head)
      flat = {name: np.asarray(x) for name, x in model.flatten(params).items()}
      if flavour == "stacked":
        stored = {name: x for name, x in flat.items() if "encoderblock_" not in name}
        for name in flat:
          if "encoderblock_0" in name:
            stored[name.replace("_0/", "/", 1)] = np.stack([flat[name], flat[name.replace("encoderblock_0", "encoderblock_1")]])
      else:
        stored = dict(self.FLAVOURS[flavour](name, x) for name, x in flat.items())
      if flavour == "opt/target/":
        stored |= {"opt/state/step": np.array(3), "extra": np.zeros(2)}
      path = os.path.join(root, "weights.npz")
      np.savez(path, **stored)
      flags.FLAGS(["train.py"])
      params, rest = train.read_weights(path)
      train.adopt_architecture(path, params, rest)
      flags.FLAGS.image_size = 16
      self.assertEqual([flags.FLAGS[name].value for name in ("variant", "posemb", "pool", "head")], ["two/8", posemb, "gap", head])
      loaded = train.fit_weights(params, 3)
      self.assertEqual(set(loaded), set(flat))
      for name, x in loaded.items():
        self.assertEqual(x.dtype, np.float32)
        np.testing.assert_allclose(x, flat[name], rtol=0.01 if "float16" in flavour else 0, err_msg=name)

  def weights_file(self, root, change=lambda flat: None, **kwargs):
    flat = {name: np.asarray(x) for name, x in model.flatten(random_params(**kwargs)).items()}
    change(flat)
    path = os.path.join(root, "weights.npz")
    np.savez(path, **flat)
    return path

  def test_what_does_not_fit_is_listed_whole(self):
    def change(flat):
      del flat["embedding/bias"], flat["Transformer/encoder_norm/scale"]
      flat["Transformer/encoder_norm/bias"] = np.zeros(5, np.float32)
      flat["pre_logits/bias"] = np.zeros(32, np.int32)
      flat["surprise"] = np.zeros(1)
    with folder() as root:
      said = run(f"--init={self.weights_file(root, change)}", "--image_size=16", "--eval_only")
    for part in ("exit: Error", "embedding/bias missing", "encoder_norm/scale missing",
                 "encoder_norm/bias float32 (5,), expected floats (32,)", "pre_logits/bias int32 (32,), expected floats (32,)",
                 "surprise unknown", "weights.npz"):
      self.assertIn(part, said)

  @parameterized.parameters(
      ({"pos_embedding": np.float32(1)}, "no ViT in it.*pos_embedding"), ({"embedding/kernel": np.zeros(3)}, "no ViT in it"),
      ({"head/bias": np.float32(1)}, "no ViT in it"), ({"pre_logits/kernel": np.float32(1)}, "does not fit"),
      ({"Transformer/encoderblock/LayerNorm_0/bias": np.float32(1)}, "does not fit"))
  def test_arrays_of_absurd_shapes_are_one_line(self, arrays, message):
    with folder() as root:
      said = run(f"--init={self.weights_file(root, lambda flat: flat.update(arrays))}", "--image_size=16", "--eval_only")
    self.assertRegex(said, f"exit: Error: --init={root}/weights.npz.*{message}")

  @parameterized.parameters("--head=linear", "--pool=cls", "--posemb=learned", "--variant=S/16")
  def test_contradicting_flag(self, flag):
    with folder() as root, flagsaver.flagsaver():
      path = self.weights_file(root)
      flags.FLAGS(["train.py", flag])
      name = flag[2:].split("=")[0]
      with self.assertRaisesRegex(train.UserError, f"{flag} contradicts --init={path}, which holds {name}="):
        train.adopt_architecture(path, *train.read_weights(path))

  def test_resample_posemb(self):
    # [0, 4; 8, 12] on 3 x 3 points, corners on corners: the halves between.
    grid = np.array([0, 4, 8, 12], np.float32).reshape(1, 4, 1)
    np.testing.assert_allclose(train.resample_posemb(grid, 9)[0, :, 0], [0, 2, 4, 4, 6, 8, 8, 10, 12])
    np.testing.assert_allclose(train.resample_posemb(grid, 4), grid)

  def test_export_timm(self):
    with folder() as root:
      out = os.path.join(root, "timm.npz")
      said = run(f"--init={self.weights_file(root)}", "--image_size=16", f"--export_timm={out}")
      self.assertIn("MLP head", said)
      with np.load(out) as file:
        expected = {f"params/{name}": x.shape for name, x in model.flatten(random_params()).items()}
        self.assertEqual({name: file[name].shape for name in file}, expected | {"params/pos_embedding": (1, 4, 32)})
        np.testing.assert_array_equal(file["params/pos_embedding"][0], model.sincos2d(2, 2, 32))
      self.assertNotIn("MLP head", run(f"--init={self.weights_file(root, head='linear')}", "--image_size=16", f"--export_timm={out}"))

  @parameterized.parameters("mlp", "linear")
  def test_timm_gives_the_same_logits(self, head):
    try:
      import timm
      import torch
    except ImportError:
      self.skipTest("timm and torch are not installed")
    with folder() as root:
      params, out = random_params(posemb="sincos2d", head=head), os.path.join(root, "timm.npz")
      run(f"--init={self.weights_file(root, head=head)}", "--image_size=16", f"--export_timm={out}")
      m = timm.models.vision_transformer.VisionTransformer(
          img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=3, class_token=False, global_pool="avg",
          fc_norm=False, act_layer="gelu_tanh")
      m.load_pretrained(out)
      if head == "mlp":  # as in the README
        w = {name: torch.from_numpy(x) for name, x in np.load(out).items()}
        m.head = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Tanh(), m.head)
        m.head[0].weight.data, m.head[0].bias.data = w["params/pre_logits/kernel"].T, w["params/pre_logits/bias"]
      images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
      with torch.no_grad():
        logits = m.eval()(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
      np.testing.assert_allclose(logits, model.forward(params, images, jnp.float32), atol=1e-4)


class Crashing:
  """A file that breaks off after some bytes."""

  def __init__(self, path, mode, limit):
    self.file, self.left = open(path, mode), limit

  def write(self, data):
    self.file.write(data[:self.left])
    self.left -= len(data)
    if self.left < 0:
      raise OSError("power cut")

  def flush(self):
    self.file.flush()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.file.close()


def free_port():
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


class RunTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.root = tempfile.mkdtemp()
    cls.data = noise_folder(cls.root)

  def flags(self, root, *more):
    return flags_for(root, self.data, *more)

  def test_train_resume_evaluate_predict(self):
    with folder() as root:
      log = run(*self.flags(root, "--epochs=24", "--lr=0.01", "--eval_every=50"))
      self.assertLen(losses(log), 120)
      self.assertRegex(log, r"step 120/120  epoch 24.00  loss \S+  lr \S+  grad \S+  \d+ images/s  waiting for data \d+%  0:00:00 left")
      self.assertEqual(re.findall("Evaluation at step (.*):", log), ["50", "100", "120"])
      with open(f"{root}/run/eval.json") as f:
        result = json.load(f)["validation"]
      self.assertEqual(result["count"], 13)
      self.assertGreater(result["top1"], 90)
      again = run(*self.flags(root, "--epochs=24", "--lr=0.01"))
      self.assertIn("Resuming after step 120", again)
      self.assertEqual(losses(again), {})

      init = f"--init={train.checkpoints(f'{root}/run')[-1][1]}"
      only = run(init, "--eval_only", f"--dataset={self.data}", "--eval=validation,train,v2", f"--workdir={root}/eval",
                 "--batch_size=8", f"--data_dir={root}", "--dtype=float32")
      self.assertRegex(only, f"validation +top-1 +{result['top1']:.2f} %.* 13 images")
      self.assertRegex(only, "train +top-1.* 40 images")
      self.assertRegex(only, "v2 +not available: .*imagenet_v2.*input_pipeline.py")
      odd = run(init, "--eval_only", f"--dataset={self.data}", "--eval=validation", f"--workdir={root}/eval", "--batch_size=3",
                "--grad_accum=7", "--dtype=float32")
      self.assertEqual(re.search("validation .*", odd)[0], re.search("validation .*", only)[0])

      pictures = [f"{self.data}validation/red/0.png", f"{self.data}validation/blue/2.png"]
      said = run(init, f"--predict={','.join(pictures)}", f"--workdir={root}/eval")
      self.assertRegex(said, "0.png: red .*%.*\n.*2.png: blue .*%")
      sheet = tf.io.decode_png(tf.io.read_file(f"{root}/eval/predictions.png")).numpy()[14:238].astype(float)
      for x in (0, 456):  # each picture, and beside it the same, darker where the model looks less
        plain, dimmed = sheet[:, x:x + 224], sheet[:, x + 228:x + 452]
        self.assertTrue((dimmed <= plain).all() and (dimmed >= 0.2 * plain - 1).all())
        self.assertGreater(dimmed.max(), 100)
      self.assertIn("not a picture", run(init, f"--predict={__file__}", f"--workdir={root}/eval"))

      events = [e for path in tf.io.gfile.glob(f"{root}/run/events*") for e in tf.compat.v1.train.summary_iterator(path)]
      tags = {value.tag for event in events for value in event.summary.value}
      self.assertLessEqual({"loss", "learning_rate", "grad_norm", "images_per_second", "validation/top1"}, tags)
      self.assertIn("first_batch", tags)

  @parameterized.parameters("sincos2d", "learned")
  def test_fine_tune_at_another_size_and_number_of_classes(self, posemb):
    with folder() as root:
      run(*self.flags(root, f"--posemb={posemb}"))
      init = f"--init={train.checkpoints(f'{root}/run')[-1][1]}"
      two = write_folder(f"{root}/two", {f"{s}/{c}/{i}.png": picture(kind="PNG", color=color) for i in range(8)
                                         for s in ("train", "validation") for c, color in (("dark", "black"), ("light", "white"))})
      log = run(*flags_for(f"{root}/tuned", two, init, "--image_size=24", "--epochs=5"))
      self.assertIn("has 3 classes, the dataset 2: starting with a new head", log)
      self.assertEqual("Resampling the position embedding from 4 to 9 tokens" in log, posemb == "learned")
      self.assertAlmostEqual(float(losses(log)["1"]), math.log(2), places=3)
      before, after = last_arrays(f"{root}/run"), last_arrays(f"{root}/tuned/run")
      name = "params/Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel"
      self.assertLess(abs(before[name] - after[name]).max(), 0.05)
      log = run(*flags_for(f"{root}/same", self.data, init, "--epochs=4"))
      self.assertNotIn("new head", log)
      self.assertIn("has 3 classes, --dataset=", run(init, "--eval_only", f"--dataset={two}", f"--workdir={root}", "--batch_size=8"))

  def test_a_signal_during_an_evaluation(self):
    batches = input_pipeline.eval_batches
    def interrupted(*args, **kwargs):
      for batch in batches(*args, **kwargs):
        train.received_signal = 15
        yield batch
    with folder() as root:
      with mock.patch.object(input_pipeline, "eval_batches", interrupted):
        log = run(*self.flags(root, "--eval_every=7", "--batch_size=8"))
      self.assertIn("Stopped after step 7; the same command goes on from there.\n\nexit: 143", log)
      self.assertEqual([step for step, _ in train.checkpoints(f"{root}/run")], [5, 7])
      self.assertFalse(os.path.exists(f"{root}/run/eval.json"))
      again = run(*self.flags(root, "--eval_every=7"))
      self.assertEqual(re.findall("Resuming after step (.*) from|Evaluation at step (.*):", again),
                       [("7", ""), ("", "7"), ("", "14"), ("", "20")])

  def test_what_cannot_be_written_does_not_end_a_run(self):
    with folder() as root:
      os.makedirs(f"{root}/run/eval.json")
      full = tf.errors.ResourceExhaustedError(None, None, "No space left on device")
      with mock.patch.object(tf.summary, "scalar", side_effect=full):
        log = run(*self.flags(root))
      self.assertRegex(log, "TensorBoard events in .* could not be written .No space left on device.; the run goes on")
      self.assertRegex(log, "eval.json could not be written")
      self.assertRegex(log, "step 20/20 .*(\n.*)*validation +top-1")
      init = f"--init={train.checkpoints(f'{root}/run')[-1][1]}"
      self.assertIn("exit: Error: --export_timm=/dev/null/x cannot be written", run(init, "--export_timm=/dev/null/x"))
      self.assertIn("exit: Error: --workdir=/dev/null cannot be", run(init, "--predict=x.png", "--workdir=/dev/null"))

  def test_keep_every(self):
    with folder() as root:
      run(*self.flags(root, "--keep_every=8"))
      self.assertEqual([step for step, _ in train.checkpoints(f"{root}/run")], [8, 16, 20])

  def test_an_evaluation_with_other_classes(self):
    with folder() as root, mock.patch.dict(train.EVALS, other=("patterns", "validation", "label")), \
        mock.patch.object(input_pipeline, "Patterns", lambda data_dir: mock.MagicMock(
            wraps=NUMBERS, info=mock.MagicMock(wraps=NUMBERS.info, splits=NUMBERS.info.splits, features={
                "image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=10)}))):
      log = run(*self.flags(root, "--eval=other,validation"))
      self.assertRegex(log, "other +not available: it has 10 classes, --dataset=.* 3\n")
      self.assertRegex(log, "validation +top-1")

  def test_benchmark(self):
    with mock.patch.object(jax, "devices", lambda d=jax.devices(): d[:1]), mock.patch.object(jax, "device_count", lambda: 1), \
        mock.patch.object(jax, "local_device_count", lambda: 1):
      said = run("--benchmark", "--variant=mu/8", "--image_size=16", "--batch_size=6", "--dtype=float32")
      self.assertRegex(said, r"mu/8 at 16, float32, batch 6 on 1 x cpu: \S+ images/s, \S+ GFLOP/s, 0.\d\d of the best matrix")
      self.assertIn("exit: Error: --batch_size=6: expected a multiple of 1 devices times --grad_accum=4",
                    run("--benchmark", "--batch_size=6", "--grad_accum=4"))

  def test_processes_are_joined_only_where_there_are_some(self):
    with mock.patch.object(jax.distributed, "initialize") as initialize, flagsaver.flagsaver():
      flags.FLAGS(["train.py"])
      alone = dict(SLURM_JOB_ID="1", SLURM_NTASKS="1", SLURM_STEP_NODELIST="a", TPU_WORKER_HOSTNAMES="localhost")
      for environment, calls in ((alone, 0), (dict(SLURM_JOB_ID="1", SLURM_NTASKS="4"), 0), (alone | {"SLURM_NTASKS": "2"}, 1),
                                 (dict(TPU_WORKER_HOSTNAMES="a,b"), 2)):
        with mock.patch.dict(os.environ, environment):
          train.start_processes()
        self.assertEqual(initialize.call_count, calls, environment)
      self.assertIn("exit: Error: --coordinator needs --num_processes and --process_id", run("--coordinator=localhost:1"))

  def test_bad_images_in_a_run(self):
    with folder() as root:
      data = noise_folder(root)
      write_folder(data, {"train/red/broken.png": b"", "validation/red/broken.png": b""})
      stopped = run(*flags_for(root, data))
      self.assertRegex(stopped, "exit: Error: bad record .*train/red/broken.png.*--skip_bad_images")
      log = run(*flags_for(root, data, "--skip_bad_images"))  # 41 records, 8 at a time, 4 epochs
      self.assertIn("4 bad images left out", log)
      self.assertRegex(log, "step 20/20  epoch 3.90")
      self.assertRegex(log, "13 images  .1 bad images left out.")

  def test_a_loss_that_is_not_finite(self):
    with folder() as root:
      log = run(*self.flags(root, "--lr=1e6", "--grad_clip_norm=0", "--weight_decay=1e8", "--epochs=20", "--warmup_steps=9",
                            "--checkpoint_every=1"))
      step = re.search(r"exit: Error: not finite at step (\d+): loss .*--lr", log)[1]
      saved, _ = train.checkpoints(f"{root}/run")[-1]
      self.assertLess(saved, int(step))
      for name, x in last_arrays(f"{root}/run").items():
        if name.startswith("params/"):
          self.assertTrue(np.isfinite(x).all(), name)

  @parameterized.parameters(
      ("--variant=XXL/16", "variant 'XXL/16': expected one of"), ("--image_size=20", "image_size 20: expected a multiple"),
      ("--warmup_steps=20", "--warmup_steps=20 is not shorter than the run of 20 steps: pass --warmup_steps=2"),
      ("--batch_size=12", "--batch_size=12: expected a multiple of 8 devices"),
      ("--grad_accum=3", "expected a multiple of 8 devices times --grad_accum=3"),
      ("--dataset=imagenet2012", "imagenet2012 is not prepared in .*--manual_dir.*patterns.*ILSVRC2012_img_train.tar"),
      ("--dataset=nothing", "no such dataset"), ("--train_split=test", "split 'test' of .* it has train .40., validation .13."),
      ("--eval=test", "none of these is available.*train, validation"),
      ("--epochs=0", "--epochs=0.0 is less than one step of --batch_size=8"), ("--workdir=/dev/null/x", "--workdir=/dev/null/x cannot be written"),
      ("--init=/nowhere.npz", "/nowhere.npz is not a checkpoint that can be read"), ("--eval_only", "need --init"))
  def test_bad_input_is_one_line(self, flag, message):
    with folder() as root:
      said = run(*self.flags(root, f"--data_dir={root}", flag))
      self.assertRegex(said, f"exit: Error: .*{message}")
      self.assertNotIn("step 1/", said)
      self.assertLen(said.split("exit: ")[1].splitlines(), 1)

  @parameterized.parameters("--lr=-1", "--weight_decay=inf", "--posemb=none", "--head=2", "--mixup=-0.1", "--randaug_layers=-1",
                            "--lr=nan", "--batch_size=0", "--epochs=inf", "--randaug_magnitude=nan")
  def test_flags_out_of_range(self, flag):
    with flagsaver.flagsaver(), self.assertRaises(flags.IllegalFlagValueError) as caught:
      flags.FLAGS(["train.py", flag])
    self.assertIn(flag.split("=")[0][2:], str(caught.exception))

  def test_changed_flags_are_refused(self):
    with folder() as root:
      run(*self.flags(root))
      fewer = run(*self.flags(root, "--epochs=2", "--allow_changes"))  # the run is longer than that already
      self.assertEqual((losses(fewer), re.findall("Evaluation at step (.*):", fewer)), ({}, ["20"]))
      self.assertRegex(run(*self.flags(root, "--mixup=0.5", "--seed=1")), r"exit: .*--mixup=0.2 \(now 0.5\), --seed=0 \(now 1\)")

  def test_report_ablations_are_flags(self):
    for pool, head, posemb in (("gap", "mlp", "learned"), ("cls", "mlp", "sincos2d"), ("gap", "linear", "sincos2d")):
      with folder() as root:
        log = run(*self.flags(root, "--epochs=1", f"--pool={pool}", f"--head={head}", f"--posemb={posemb}", "--randaug_layers=0",
                              "--mixup=0", "--grad_clip_norm=0", "--warmup_steps=0"))
        names = last_arrays(f"{root}/run")
        self.assertEqual([f"params/{name}" in names for name in ("cls", "pre_logits/kernel", "pos_embedding")],
                         [pool == "cls", head == "mlp", posemb == "learned"], log)

  # Runs that are killed need processes of their own.

  def start(self, root, *more, devices=1, **kwargs):
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "TF_CPP_MIN_LOG_LEVEL": "3"}
    return subprocess.Popen([sys.executable, "-u", os.path.join(HERE, "train.py"), *self.flags(root, *more)], env=environment,
                            stdout=subprocess.PIPE, stderr=kwargs.pop("stderr", subprocess.DEVNULL), text=True)

  def wait_for(self, process, pattern, log):
    for line in process.stdout:
      log.append(line)
      if re.search(pattern, line):
        return
    self.fail(f"{pattern} never came: {''.join(log)}")

  LONG = ("--epochs=40", "--checkpoint_every=1")  # 200 steps; some checkpoint is being written nearly always

  def assert_same_run(self, root, expected, logs):
    for name, x in last_arrays(f"{root}/run").items():
      np.testing.assert_array_equal(x, expected[name], name)
    for log in logs:
      for step, loss in losses(log).items():
        self.assertEqual(loss, self.uninterrupted_losses[step], step)

  def uninterrupted(self, root):
    log = self.start(f"{root}/whole", *self.LONG).communicate()[0]
    self.uninterrupted_losses = losses(log)
    self.assertLen(self.uninterrupted_losses, 200)
    return last_arrays(f"{root}/whole/run")

  def test_killed_at_random_the_run_is_the_same(self):
    rng, logs, reached = np.random.default_rng(int(time.time())), [], 0
    with folder() as root:
      expected = self.uninterrupted(root)
      for kill in (signal.SIGKILL,) * 5 + (signal.SIGTERM, signal.SIGINT):
        process, log = self.start(root, *self.LONG), []
        self.wait_for(process, f"^step {reached + rng.integers(1, 8)}/", log)
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(kill)
        rest, _ = process.communicate(timeout=60)
        logs.append("".join(log) + rest)
        code = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[kill]
        if process.returncode == 0 and "step 200/200" in rest:
          break  # too fast for us
        self.assertEqual(process.returncode, code, logs[-1])
        if kill != signal.SIGKILL:
          self.assertRegex(logs[-1], "saving a checkpoint and stopping(.|\n)*Stopped after step .*the same command goes on")
        saved = [step for step, _ in train.checkpoints(f"{root}/run")]
        reached = saved[-1] if saved else 0
      final = self.start(root, *self.LONG).communicate()[0]
      self.assertIn("Resuming after step", final)
      self.assert_same_run(root, expected, [*logs, final])

  def test_two_processes_are_one(self):
    with folder() as root:
      one = run(*self.flags(root, "--batch_size=16"))  # eight devices in this process
      port = free_port()
      def start(epochs, i):
        return self.start(f"{root}/two", "--batch_size=16", f"--epochs={epochs}", f"--coordinator=127.0.0.1:{port}", "--num_processes=2",
                          f"--process_id={i}", devices=4, stderr=subprocess.STDOUT)
      pair = [start(4, i) for i in range(2)]
      second = []
      reader = threading.Thread(target=lambda: second.append(pair[1].communicate()[0]))
      reader.start()
      log = pair[0].communicate()[0]
      reader.join()
      self.assertEqual([p.returncode for p in pair], [0, 0], log[-3000:] + second[0][-3000:])
      self.assertNotIn("step 1/", second[0])
      for step, loss in losses(one).items():
        self.assertAlmostEqual(float(losses(log)[step]), float(loss), delta=2e-4)
      self.assertEqual(re.search("validation .*", log)[0], re.search("validation .*", one)[0])  # 13 images, once each

  def test_a_lost_process_ends_the_other(self):
    with folder() as root:
      port = free_port()
      flag = ("--batch_size=16", "--epochs=4000", f"--coordinator=127.0.0.1:{port}", "--num_processes=2")
      pair = [self.start(root, *flag, f"--process_id={i}", devices=4, stderr=subprocess.STDOUT) for i in range(2)]
      log = []
      self.wait_for(pair[0], "^step 7/", log)
      pair[1].kill()
      started = time.time()
      rest = pair[0].communicate(timeout=90)[0]
      pair[1].communicate()
      self.assertLess(time.time() - started, 60)
      self.assertNotEqual(pair[0].returncode, 0)
      self.assertRegex(rest, "another process of this run was lost|another task died")
      self.assertGreaterEqual(train.checkpoints(f"{root}/run")[-1][0], 5)


class ReadmeTest(absltest.TestCase):

  def test_commands_parse(self):
    with open(os.path.join(HERE, "README.md")) as f:
      readme = f.read()
    commands = re.findall(r"^(?:\$ |\| .*`|.*&& )?(python \w+\.py[^|`\n]*)", readme.replace("\\\n", " "), re.M)
    self.assertGreater(len(commands), 15)
    seen = set()
    for command in commands:
      _, script, *arguments = shlex.split(command.split("#")[0].replace("[", "").replace("]", ""))
      self.assertTrue(os.path.exists(os.path.join(HERE, script)), command)
      if script == "train.py":
        with flagsaver.flagsaver():
          flags.FLAGS([script, *arguments])
          seen.update(name for name in flags.FLAGS if flags.FLAGS[name].present)
    self.assertLessEqual({"epochs", "batch_size", "posemb", "pool", "head", "randaug_layers", "mixup", "eval_only", "predict",
                          "export_timm", "benchmark"}, seen)


if __name__ == "__main__":
  absltest.main()
