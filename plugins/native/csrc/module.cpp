// The Python module `qhub_native._native`. Shapes are checked here: nothing behind it checks them again.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "checksum.h"
#include "decoder.h"
#include "file.h"
#include "kernels.h"
#include "measure.h"
#include "sampler.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace qhub;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using WritableBytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using FloatRows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using ByteRows = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Linears = std::vector<std::shared_ptr<Linear>>;
using Ids = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void require(bool holds, const std::string& rule) {
  if (!holds) throw nb::value_error(rule.c_str());
}

const Kernel& kernel_named(const std::string& name) {
  for (const Kernel* const* kernel = kKernels; *kernel; ++kernel)
    if (name == (*kernel)->name && (*kernel)->runs(cpu())) return **kernel;
  throw nb::value_error(("no kernel `" + name + "` runs here").c_str());
}

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const Kernel* const* kernel = kKernels; *kernel; ++kernel)
    if ((*kernel)->runs(cpu())) names.emplace_back((*kernel)->name);
  return names;
}

// The vector operations that go with a kernel: forcing a lower instruction set lowers both.
const Ops& ops_for(const std::string& kernel) {
  const char* name = kernel == "scalar" ? "scalar" : kernel.rfind("avx2", 0) == 0 || kernel.rfind("avx_", 0) == 0 ? "avx2" : nullptr;
  return name ? *ops_named(name) : ops(cpu());
}

Shape checked(const Shape& shape) {
  require(shape.rows > 0 && shape.inputs > 0, "a matrix has rows and inputs");
  require(shape.group == 32 || shape.group == 64 || shape.group == 128, "group is 32, 64 or 128");
  require(shape.bits == 4 || shape.bits == 8, "bits are 4 or 8");
  require(shape.rows < (size_t{1} << 31) && shape.inputs < (size_t{1} << 24), "a matrix of this size is not supported");
  return shape;
}

// Whether memory holds a packed matrix of this shape, neither more nor less.
template <class Array>
void require_fit(const Array& memory, const Shape& shape) {
  require(memory.size() == packed_bytes(shape).total() && reinterpret_cast<uintptr_t>(memory.data()) % kLine == 0, "memory does not fit the matrix");
}

Float float_named(const std::string& type) {
  require(type == "F32" || type == "F16" || type == "BF16", "a float matrix is F32, F16 or BF16");
  return type == "F32" ? Float::f32 : type == "F16" ? Float::f16 : Float::bf16;
}

// Arrays of some rows, checked against the shape; they outlive the call because the caller holds them.
struct Part {
  ByteRows codes;
  FloatRows scale;
  std::optional<ByteRows> zero;
  int bits;
  size_t every;
};

Rows checked_rows(const Part& part, const Shape& shape) {
  require(part.bits >= 2 && part.bits <= shape.bits, "codes have 2 bits at least and no more than the matrix");
  require(part.codes.shape(1) * 8 >= shape.inputs * static_cast<size_t>(part.bits), "a row of codes is shorter than its inputs");
  require(part.scale.shape(0) == part.codes.shape(0), "there is a row of scales for each row of codes");
  require(part.scale.shape(1) >= 1 && part.every >= 1, "a row has a scale");
  require(part.every % shape.group == 0 || part.every >= shape.inputs, "inputs that share a scale are a multiple of the group");
  require(part.scale.shape(1) * part.every >= shape.inputs, "there are too few scales for the inputs");
  require(part.zero.has_value() != shape.symmetric, "an asymmetric matrix has zeros, a symmetric one has none");
  if (part.zero) require(part.zero->shape(0) == part.scale.shape(0) && part.zero->shape(1) == part.scale.shape(1), "there is a zero for each scale");
  return {part.codes.data(), part.codes.shape(1), part.bits, part.scale.data(), part.zero ? part.zero->data() : nullptr, part.scale.shape(1),
          part.every, part.codes.shape(0)};
}

int pack_into(Pool& pool, const Shape& shape, const std::vector<Part>& parts, WritableBytes memory) {
  std::vector<Rows> rows;
  size_t total = 0;
  for (const Part& part : parts) {
    rows.push_back(checked_rows(part, shape));
    total += rows.back().rows;
  }
  require(total == shape.rows, "the parts make up the rows");
  require_fit(memory, shape);
  nb::gil_scoped_release release;
  int exponent = 0;
  if (!scale_exponent(rows, exponent)) throw std::domain_error("a scale is not exact in 16 bits");
  std::memset(memory.data(), 0, memory.size());
  pack(pool, shape, rows, exponent, memory.data());
  return exponent;
}

// Rounds float rows to 8 bits, symmetric, by group, into `memory`.
void pack_float(Pool& pool, const Shape& shape, Bytes rows, const std::string& type, WritableBytes memory) {
  const Float kind = float_named(type);
  require(shape.bits == 8 && shape.symmetric, "float rows become 8 bits, symmetric");
  require(rows.size() == shape.rows * shape.inputs * float_bytes(kind), "the rows do not fit the matrix");
  require_fit(memory, shape);
  nb::gil_scoped_release release;
  pack_rounded(pool, shape, ops(cpu()), kind, rows.data(), memory.data());
}

std::shared_ptr<Linear> quantized(Bytes memory, const Shape& shape, int exponent) {
  require_fit(memory, shape);
  return std::make_shared<Linear>(Linear::quantized(packed_view(shape, memory.data(), exponent)));
}

std::shared_ptr<Linear> dense(Bytes memory, const std::string& type, size_t rows, size_t inputs) {
  const Float kind = float_named(type);
  require(memory.size() == rows * inputs * float_bytes(kind), "memory does not fit the matrix");
  return std::make_shared<Linear>(Linear::dense(kind, memory.data(), rows, inputs));
}

Engine engine(Pool& pool, const std::string& kernel, bool exact) { return {&pool, &kernel_named(kernel), &ops_for(kernel), exact}; }

nb::ndarray<nb::numpy, float> array(std::vector<float> values, std::vector<size_t> shape) {
  auto* held = new std::vector<float>(std::move(values));
  nb::capsule owner(held, [](void* data) noexcept { delete static_cast<std::vector<float>*>(data); });
  return nb::ndarray<nb::numpy, float>(held->data(), shape.size(), shape.data(), owner);
}

nb::ndarray<nb::numpy, float> multiply(const Linear& linear, Pool& pool, const std::string& kernel, bool exact, FloatRows x) {
  require(x.shape(1) == linear.inputs(), "x has the matrix's inputs");
  const Engine with = engine(pool, kernel, exact);
  const size_t m = x.shape(0), n = linear.rows();
  std::vector<float> y(m * n);
  {
    nb::gil_scoped_release release;
    Scratch scratch;
    linear.multiply(with, scratch, x.data(), m, y.data(), n);
  }
  return array(std::move(y), {m, n});
}

Norm norm_of(const std::optional<Floats>& weights, size_t size) {
  if (!weights) return {};
  require(weights->size() == size, "a norm has as many weights as what it norms");
  return Norm(weights->data(), weights->data() + weights->size());
}

void set_bias(Linear& linear, Floats bias) {
  require(bias.size() == linear.rows(), "there is a bias for each row");
  linear.bias.assign(bias.data(), bias.data() + bias.size());
}

void check_layer(const Architecture& a, const Layer& layer, size_t ropes) {
  auto fits = [](const Stack& stack, size_t rows, size_t inputs) {
    for (const auto& part : stack.parts) require(part && part->inputs() == inputs, "layers of a stack read the same input");
    return stack.rows() == rows;
  };
  require(fits(layer.qkv, (a.heads + 2 * a.kv_heads) * a.dim, a.hidden), "qkv does not fit the architecture");
  require(fits(layer.out, a.hidden, a.heads * a.dim), "out does not fit the architecture");
  require(fits(layer.gate_up, 2 * a.ffn, a.hidden), "gate_up does not fit the architecture");
  require(fits(layer.down, a.hidden, a.ffn), "down does not fit the architecture");
  require(layer.rope < ropes, "a layer names a table of frequencies that is not there");
}

void check(const Architecture& a, const std::vector<Rope>& ropes) {
  require(a.hidden && a.heads && a.kv_heads && a.dim && a.ffn && a.vocabulary && a.context, "an architecture's sizes are positive");
  require(a.heads % a.kv_heads == 0, "key/value heads divide the heads");
  require(a.dim % 2 == 0, "the size of a head is even");
  for (const Rope& rope : ropes) require(rope.frequencies.size() * 2 <= a.dim, "a head has two numbers for each frequency");
}

std::vector<Piece> pieces_of(const Decoder& decoder, const std::vector<std::shared_ptr<Sequence>>& sequences, const std::vector<Ids>& ids) {
  require(!ids.empty() && sequences.size() == ids.size(), "each sequence gets tokens");
  std::vector<Piece> pieces;
  for (size_t i = 0; i < ids.size(); ++i) {
    const std::span<const int32_t> tokens(ids[i].data(), ids[i].size());
    require(!tokens.empty(), "a step has a token at least");
    require(std::count(sequences.begin(), sequences.end(), sequences[i]) == 1, "a sequence appears once in a step");
    require(sequences[i]->length() + tokens.size() <= sequences[i]->capacity(), "the sequence has no room for these tokens");
    const auto known = [&](int32_t token) { return token >= 0 && static_cast<size_t>(token) < decoder.architecture.vocabulary; };
    require(std::all_of(tokens.begin(), tokens.end(), known), "a token is not in the vocabulary");
    pieces.push_back({sequences[i].get(), tokens});
  }
  return pieces;
}

nb::ndarray<nb::numpy, float> step(Decoder& decoder, const std::vector<std::shared_ptr<Sequence>>& sequences, const std::vector<Ids>& ids, const std::string& wanted) {
  const Wanted what = wanted == "last" ? Wanted::last : wanted == "all" ? Wanted::all : Wanted::hidden;
  require(wanted == "last" || wanted == "all" || wanted == "hidden", "wanted is last, all or hidden");
  require(decoder.head && decoder.embedding && !decoder.norm.empty(), "the decoder is not complete");
  const std::vector<Piece> pieces = pieces_of(decoder, sequences, ids);
  size_t rows = pieces.size();
  if (what != Wanted::last) {
    rows = 0;
    for (const Piece& piece : pieces) rows += piece.tokens.size();
  }
  const size_t width = what == Wanted::hidden ? decoder.architecture.hidden : decoder.architecture.vocabulary;
  std::vector<float> out(rows * width);
  {
    nb::gil_scoped_release release;
    decoder.step(pieces, what, out.data());
  }
  return array(std::move(out), {rows, width});
}

}  // namespace

NB_MODULE(_native, module) {
  module.def("kernel_names", &kernel_names, "The kernels that run on this processor, best first.");

  nb::class_<Pool>(module, "Pool").def(nb::init<int>(), "threads"_a).def_prop_ro("threads", &Pool::threads);

  nb::class_<Shape>(module, "Shape")
      .def("__init__", [](Shape* self, size_t rows, size_t inputs, size_t group, int bits, bool symmetric) {
        new (self) Shape(checked({rows, inputs, group, bits, symmetric}));
      }, "rows"_a, "inputs"_a, nb::kw_only(), "group"_a, "bits"_a, "symmetric"_a)
      .def_ro("rows", &Shape::rows).def_ro("inputs", &Shape::inputs).def_ro("group", &Shape::group)
      .def_ro("bits", &Shape::bits).def_ro("symmetric", &Shape::symmetric)
      .def_prop_ro("packed_bytes", [](const Shape& self) { return packed_bytes(self).total(); });

  nb::class_<Part>(module, "Part")
      .def("__init__", [](Part* self, ByteRows codes, FloatRows scale, std::optional<ByteRows> zero, int bits, size_t every) {
        new (self) Part{codes, scale, zero, bits, every};
      }, "codes"_a, "scale"_a, "zero"_a.none(), nb::kw_only(), "bits"_a, "every"_a);

  module.def("pack", &pack_into, "pool"_a, "shape"_a, "parts"_a, "memory"_a,
             "Packs the parts, one below the other, into `memory` (uint8, 64-byte aligned). Returns the exponent of the scales.");

  module.def("pack_float", &pack_float, "pool"_a, "shape"_a, "rows"_a, "dtype"_a, "memory"_a, "Rounds float rows to 8 bits into `memory`.");
  module.def("read_file", [](Pool& pool, const std::string& path, size_t offset, size_t count) {
    require(count > 0, "there is something to read");
    Memory* held = nullptr;
    {
      nb::gil_scoped_release release;
      held = new Memory(read_file(pool, path, offset, count));
    }
    nb::capsule owner(held, [](void* memory) noexcept { delete static_cast<Memory*>(memory); });
    return nb::ndarray<nb::numpy, uint8_t>(held->data(), {count}, owner);
  }, "pool"_a, "path"_a, "offset"_a, "count"_a, "Part of a file as a uint8 array in large pages.");
  module.def("checksum", [](Pool& pool, Bytes bytes) {
    nb::gil_scoped_release release;
    return checksum(pool, bytes.data(), bytes.size());
  }, "pool"_a, "bytes"_a, "64 bits that change when the bytes do; not against an adversary.");

  nb::class_<Linear>(module, "Linear")
      .def_static("quantized", &quantized, "memory"_a, "shape"_a, "exponent"_a, nb::keep_alive<0, 1>())
      .def_static("dense", &dense, "memory"_a, "dtype"_a, "rows"_a, "inputs"_a, nb::keep_alive<0, 1>())
      .def_prop_ro("rows", &Linear::rows).def_prop_ro("inputs", &Linear::inputs).def_prop_ro("is_packed", &Linear::is_packed)
      .def("set_bias", &set_bias, "bias"_a)
      .def("set_plan", [](Linear& self, size_t index, const std::string& kernel, size_t rows, size_t blocks) {
        require(index < kBuckets && rows > 0, "there is no such bucket of rows");
        self.plans[index] = {&kernel_named(kernel), rows, blocks};
      }, "bucket"_a, "kernel"_a, "rows"_a, "blocks"_a)
      .def("multiply", &multiply, "pool"_a, "kernel"_a, "exact"_a, "x"_a);

  module.def("read_bandwidth", [](Pool& pool, size_t bytes, double seconds) {
    require(bytes >= (size_t{1} << 20) && seconds >= 0 && seconds <= 60, "a megabyte at least, a minute at most");
    nb::gil_scoped_release release;
    return read_bandwidth(pool, ops(cpu()), bytes, seconds);
  }, "pool"_a, "bytes"_a, "seconds"_a, "Bytes per second that the pool's threads read from memory.");
  module.def("peak_operations", [](Pool& pool, const std::string& kernel, double seconds) {
    require(seconds >= 0 && seconds <= 60, "a minute at most");
    const Kernel& named = kernel_named(kernel);
    nb::gil_scoped_release release;
    return peak_operations(pool, named, seconds);
  }, "pool"_a, "kernel"_a, "seconds"_a, "Int8 operations per second by the kernel's instruction alone; 0: not known.");
  module.def("time_plan", [](const Linears& alike, Pool& pool, size_t m, const std::string& kernel, size_t rows, size_t blocks, double seconds) {
    require(!alike.empty() && m > 0 && rows > 0 && seconds <= 60, "there is something to time");
    for (const auto& linear : alike) require(linear->rows() == alike[0]->rows() && linear->inputs() == alike[0]->inputs(), "they have one shape");
    const Engine with = engine(pool, kernel, false);
    nb::gil_scoped_release release;
    return time_plan(with, alike, m, {&kernel_named(kernel), rows, blocks}, seconds);
  }, "linears"_a, "pool"_a, "m"_a, "kernel"_a, "rows"_a, "blocks"_a, "seconds"_a, "Seconds of each of several products of m rows.");
  module.def("bucket", &bucket, "m"_a, "Which products share a plan: the bucket of m rows.");

  nb::class_<Embedding>(module, "Embedding")
      .def("__init__", [](Embedding* self, const std::string& path, size_t offset, const std::string& type, size_t rows, size_t size) {
        require(rows > 0 && size > 0, "an embedding has rows");
        new (self) Embedding(path, offset, float_named(type), rows, size);
      }, "path"_a, "offset"_a, "dtype"_a, "rows"_a, "size"_a);

  nb::class_<Architecture>(module, "Architecture")
      .def(nb::init<>())
      .def_rw("hidden", &Architecture::hidden).def_rw("heads", &Architecture::heads).def_rw("kv_heads", &Architecture::kv_heads)
      .def_rw("dim", &Architecture::dim).def_rw("ffn", &Architecture::ffn).def_rw("vocabulary", &Architecture::vocabulary)
      .def_rw("context", &Architecture::context).def_rw("eps", &Architecture::eps).def_rw("embedding_scale", &Architecture::embedding_scale)
      .def_rw("attention_scale", &Architecture::attention_scale).def_rw("attention_softcap", &Architecture::attention_softcap)
      .def_rw("logit_softcap", &Architecture::logit_softcap)
      .def_prop_rw("gate", [](const Architecture& self) { return static_cast<int>(self.gate); },
                   [](Architecture& self, int gate) { require(gate >= 0 && gate <= 2, "unknown gate"); self.gate = static_cast<Gate>(gate); });

  nb::class_<Sequence>(module, "Sequence")
      .def_prop_ro("length", &Sequence::length).def_prop_ro("capacity", &Sequence::capacity).def_prop_ro("bytes_used", &Sequence::bytes_used)
      .def("truncate", &Sequence::truncate, "length"_a);

  nb::class_<Decoder>(module, "Decoder")
      .def("__init__", [](Decoder* self, const Architecture& architecture, const std::vector<std::pair<Floats, float>>& tables, Pool& pool, const std::string& kernel, bool exact) {
        std::vector<Rope> ropes;
        for (const auto& [frequencies, factor] : tables) ropes.push_back({{frequencies.data(), frequencies.data() + frequencies.size()}, factor});
        check(architecture, ropes);
        new (self) Decoder(architecture, std::move(ropes), engine(pool, kernel, exact));
      }, "architecture"_a, "ropes"_a, "pool"_a, "kernel"_a, "exact"_a, nb::keep_alive<1, 4>())
      .def("set_ends", [](Decoder& self, std::shared_ptr<Embedding> embedding, std::shared_ptr<Linear> head, Floats norm) {
        const Architecture& a = self.architecture;
        require(embedding && embedding->rows() == a.vocabulary && embedding->size() == a.hidden, "the embedding does not fit");
        require(head && head->rows() == a.vocabulary && head->inputs() == a.hidden, "the head does not fit");
        self.embedding = std::move(embedding);
        self.head = std::move(head);
        self.norm = norm_of(norm, a.hidden);
      }, "embedding"_a, "head"_a, "norm"_a)
      .def("add_layer", [](Decoder& self, const Linears& qkv, const Linears& out, const Linears& gate_up, const Linears& down, const nb::dict& norms, size_t window, size_t rope) {
        const Architecture& a = self.architecture;
        const auto norm = [&](const char* name, size_t size) {
          return norms.contains(name) ? norm_of(nb::cast<Floats>(norms[name]), size) : Norm{};
        };
        Layer layer{{qkv}, {out}, {gate_up}, {down}, norm("attention", a.hidden), norm("attention_out", a.hidden),
                    norm("query", a.dim), norm("key", a.dim), norm("mlp", a.hidden), norm("mlp_out", a.hidden), window, rope};
        check_layer(a, layer, self.ropes.size());
        self.layers.push_back(std::move(layer));
      }, "qkv"_a, "out"_a, "gate_up"_a, "down"_a, "norms"_a, "window"_a, "rope"_a)
      .def("sequence", [](const Decoder& self, size_t capacity, int bits) {
        require(bits == 8 || bits == 16 || bits == 32, "keys and values have 8, 16 or 32 bits");
        require(capacity > 0 && capacity <= self.architecture.context, "a sequence is no longer than the model's context");
        return std::make_shared<Sequence>(self.layers.size(), self.architecture, capacity, bits == 32 ? Kept::f32 : bits == 16 ? Kept::f16 : Kept::i8);
      }, "capacity"_a, "bits"_a)
      .def("step", &step, "sequences"_a, "ids"_a, "wanted"_a);

  nb::class_<Sampling>(module, "Sampling").def(nb::init<>())
      .def_rw("temperature", &Sampling::temperature).def_rw("top_k", &Sampling::top_k).def_rw("top_p", &Sampling::top_p)
      .def_rw("min_p", &Sampling::min_p).def_rw("repetition_penalty", &Sampling::repetition_penalty);
  nb::class_<Random>(module, "Random").def(nb::init<uint64_t>(), "seed"_a);
  module.def("sample", [](Floats logits, Ids seen, const Sampling& settings, Random& random) {
    require(logits.size() > 0, "there are logits");
    std::vector<float> changed(logits.data(), logits.data() + logits.size());
    const auto known = [&](int32_t token) { return token >= 0 && static_cast<size_t>(token) < changed.size(); };
    require(std::all_of(seen.data(), seen.data() + seen.size(), known), "a token is not in the vocabulary");
    return sample(changed, {seen.data(), seen.size()}, settings, random);
  }, "logits"_a, "seen"_a, "settings"_a, "random"_a);
}
