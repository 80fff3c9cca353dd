// Seconds of one matrix product in ggml, the library under llama.cpp, with its own choice of packing and kernel.
//
// Reads lines `K N M threads copies repeats` and answers each with one line: microseconds per product, one figure per repeat.
// Weights are random values quantized to Q4_0 (or the type named as argument: q4_0, q4_k, q8_0) and stored the way llama.cpp
// stores a model's: in the first buffer type of the CPU that takes them (AMX, repacked, plain). `copies` distinct matrices are
// multiplied one after another, so that with enough of them none is in a cache. A repeat is a graph over all the copies.
//
// Build: see README.md. Threads are those of the library's build (OpenMP by default), as in llama-bench.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

namespace {

struct Case {
  int64_t inputs, outputs, rows;
  int threads, copies, repeats;
};

ggml_type type_named(const std::string& name) {
  for (int type = 0; type < GGML_TYPE_COUNT; ++type) {
    const char* known = ggml_type_name(static_cast<ggml_type>(type));
    if (known && name == known) return static_cast<ggml_type>(type);
  }
  std::fprintf(stderr, "ggml has no type `%s`\n", name.c_str());
  std::exit(2);
}

// Weights [copies] of N rows × K, in the buffer type that llama.cpp would choose.
class Model {
 public:
  Model(ggml_type type, const Case& c) : inputs_(c.inputs), outputs_(c.outputs), copies_(c.copies) {
    ggml_init_params params{ggml_tensor_overhead() * static_cast<size_t>(c.copies + 8), nullptr, true};
    context_ = ggml_init(params);
    for (int i = 0; i < c.copies; ++i) weights_.push_back(ggml_new_tensor_2d(context_, type, c.inputs, c.outputs));
    buffer_ = allocate();
    if (!buffer_) std::exit(3);
    fill(type);
  }
  ~Model() {
    ggml_backend_buffer_free(buffer_);
    ggml_free(context_);
  }
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  bool fits(const Case& c) const { return c.inputs == inputs_ && c.outputs == outputs_ && c.copies == copies_; }
  const std::vector<ggml_tensor*>& weights() const { return weights_; }

 private:
  static bool takes(ggml_backend_dev_t device, ggml_backend_buffer_type_t type, ggml_tensor* weight) {
    ggml_init_params params{ggml_tensor_overhead() * 8, nullptr, true};
    std::unique_ptr<ggml_context, decltype(&ggml_free)> scratch(ggml_init(params), &ggml_free);
    ggml_tensor* x = ggml_new_tensor_2d(scratch.get(), GGML_TYPE_F32, weight->ne[0], 512);
    ggml_tensor* product = ggml_mul_mat(scratch.get(), weight, x);
    weight->buffer = ggml_backend_buft_alloc_buffer(type, 0);
    const bool supported = ggml_backend_dev_supports_op(device, product);
    ggml_backend_buffer_free(weight->buffer);
    weight->buffer = nullptr;
    return supported;
  }

  ggml_backend_buffer_t allocate() {
    ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    auto extra = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts"));
    for (ggml_backend_buffer_type_t* type = extra ? extra(device) : nullptr; type && *type; ++type)
      if (takes(device, *type, weights_[0])) {
        std::fprintf(stderr, "weights in %s\n", ggml_backend_buft_name(*type));
        return ggml_backend_alloc_ctx_tensors_from_buft(context_, *type);
      }
    return ggml_backend_alloc_ctx_tensors_from_buft(context_, ggml_backend_cpu_buffer_type());
  }

  void fill(ggml_type type) {
    std::mt19937 random(0);
    std::normal_distribution<float> normal(0.0f, 0.02f);
    std::vector<float> values(static_cast<size_t>(inputs_ * outputs_));
    for (float& value : values) value = normal(random);
    std::vector<char> packed(ggml_row_size(type, inputs_) * static_cast<size_t>(outputs_));
    ggml_quantize_chunk(type, values.data(), packed.data(), 0, outputs_, inputs_, nullptr);
    for (ggml_tensor* weight : weights_) ggml_backend_tensor_set(weight, packed.data(), 0, packed.size());
  }

  int64_t inputs_, outputs_;
  int copies_;
  ggml_context* context_;
  ggml_backend_buffer_t buffer_;
  std::vector<ggml_tensor*> weights_;
};

void answer(ggml_backend_t backend, const Model& model, const Case& c) {
  const size_t nodes = model.weights().size() * 2 + 8;
  ggml_init_params params{ggml_tensor_overhead() * nodes + ggml_graph_overhead_custom(nodes, false), nullptr, true};
  ggml_context* context = ggml_init(params);
  ggml_tensor* x = ggml_new_tensor_2d(context, GGML_TYPE_F32, c.inputs, c.rows);
  ggml_cgraph* graph = ggml_new_graph_custom(context, nodes, false);
  for (ggml_tensor* weight : model.weights()) ggml_build_forward_expand(graph, ggml_mul_mat(context, weight, x));
  ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(context, backend);
  std::vector<float> values(static_cast<size_t>(c.inputs * c.rows));
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i % 17) / 8.0f - 1.0f;
  ggml_backend_tensor_set(x, values.data(), 0, values.size() * sizeof(float));
  ggml_backend_cpu_set_n_threads(backend, c.threads);
  ggml_backend_graph_compute(backend, graph);
  for (int i = 0; i < c.repeats; ++i) {
    const int64_t start = ggml_time_us();
    ggml_backend_graph_compute(backend, graph);
    std::printf("%.2f ", static_cast<double>(ggml_time_us() - start) / c.copies);
  }
  std::printf("\n");
  std::fflush(stdout);
  ggml_backend_buffer_free(buffer);
  ggml_free(context);
}

}  // namespace

int main(int argc, char** argv) {
  const ggml_type type = type_named(argc > 1 ? argv[1] : "q4_0");
  ggml_time_init();
  ggml_log_set([](ggml_log_level level, const char* text, void*) { if (level >= GGML_LOG_LEVEL_WARN) std::fputs(text, stderr); }, nullptr);
  ggml_backend_t backend = ggml_backend_cpu_init();
  std::unique_ptr<Model> model;
  long long inputs, outputs, rows;
  int threads, copies, repeats;
  while (std::scanf("%lld %lld %lld %d %d %d", &inputs, &outputs, &rows, &threads, &copies, &repeats) == 6) {
    const Case c{inputs, outputs, rows, threads, copies, repeats};
    if (!model || !model->fits(c)) {
      model.reset();
      model = std::make_unique<Model>(type, c);
    }
    answer(backend, *model, c);
  }
  model.reset();
  ggml_backend_free(backend);
}
