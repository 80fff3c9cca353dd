// A decoder-only language model: float32 between the layers, quantized or float weights in them.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "embedding.h"
#include "linear.h"
#include "memory.h"

namespace qhub {

using Norm = std::vector<float>;  // weights; empty: there is no such norm

// One block. Shapes: hidden H, heads × dim queries, kv_heads × dim keys and values, ffn F.
//   x += attention_out_norm(out(attend(query_norm(q), key_norm(k), v)))    q, k, v = qkv(attention_norm(x))
//   x += mlp_out_norm(down(gate(g) · u))                                   g, u = gate_up(mlp_norm(x))
struct Layer {
  Stack qkv, out, gate_up, down;
  Norm attention_norm, attention_out_norm, query_norm, key_norm, mlp_norm, mlp_out_norm;
  size_t window = 0;  // positions that a query sees, its own included; 0: all
  size_t rope = 0;    // which of the model's tables of frequencies
};

struct Architecture {
  size_t hidden = 0, heads = 0, kv_heads = 0, dim = 0, ffn = 0, vocabulary = 0, context = 0;
  float eps = 1e-5f, embedding_scale = 1, attention_scale = 0, attention_softcap = 0, logit_softcap = 0;
  Gate gate = Gate::silu;
};

// Angles per position: frequency i turns the pair (i, i + size) of a head; both cosine and sine are multiplied by `factor`.
struct Rope {
  std::vector<float> frequencies;
  float factor = 1;
};

// Keys and values of one conversation. Memory is touched as it grows.
class Sequence {
 public:
  Sequence(size_t layers, const Architecture& shape, size_t capacity, Kept kept);

  Cache cache(size_t layer, size_t head) const;
  size_t length() const { return length_; }
  size_t capacity() const { return capacity_; }
  // Forgets what comes after the first `length` tokens.
  void truncate(size_t length) { length_ = length < length_ ? length : length_; }
  size_t bytes_used() const;

 private:
  friend class Decoder;
  size_t bytes_for(size_t positions) const;

  size_t layers_, kv_heads_, size_, capacity_, length_ = 0;
  Kept kept_;
  Memory keys_, values_, scales_;
};

// Tokens that one sequence gets in one step.
struct Piece {
  Sequence* sequence;
  std::span<const int32_t> tokens;
};

enum class Wanted { last, all, hidden };

class Decoder {
 public:
  Decoder(Architecture architecture, std::vector<Rope> ropes, Engine engine);

  Architecture architecture;
  std::vector<Layer> layers;
  std::vector<Rope> ropes;
  std::shared_ptr<Embedding> embedding;  // (V, H)
  std::shared_ptr<Linear> head;            // (V, H)
  Norm norm;
  Engine engine;

  // Runs the pieces together; long ones in chunks. Returns logits (rows, V) or hidden states (rows, H), after the last norm: of each
  // piece's last token, or of all tokens. Checks nothing: tokens < V and room in the sequences are the caller's duty.
  void step(std::span<const Piece> pieces, Wanted wanted, float* out);

 private:
  struct Token {
    Sequence* sequence;
    size_t position;
  };
  struct Span;

  void chunk(std::span<const Piece> pieces);
  void set_angles();
  const float* angles(size_t table, size_t row) const;
  void attention(const Layer& layer, size_t index);
  void rotate_and_store(const Layer& layer, size_t index);
  void attend(const Layer& layer, size_t index);
  void mlp(const Layer& layer);
  const float* normed(const Norm& norm);
  void add_normed(const Norm& norm);
  void finish(float* rows, size_t count, Wanted wanted, float* out);
  std::vector<Span> spans(size_t longest) const;
  size_t chunk_tokens() const;

  std::vector<Token> tokens_;
  std::vector<float> x_, normed_, qkv_, mixed_, part_, gated_, angles_, attention_scratch_, last_;
  Scratch scratch_;
};

}  // namespace qhub
