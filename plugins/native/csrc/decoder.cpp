#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace qhub {
namespace {

constexpr size_t kActivationBytes = size_t{12} << 20;  // of the tokens that go through together
constexpr size_t kQueryRows = 32;  // rows of queries that walk over the keys together

size_t tiles(size_t count, size_t step) { return (count + step - 1) / step; }

size_t rounded(size_t capacity) { return tiles(capacity, kScoreBlock) * kScoreBlock; }

}  // namespace

Sequence::Sequence(size_t layers, const Architecture& shape, size_t capacity, Kept kept)
    : layers_(layers), kv_heads_(shape.kv_heads), size_(shape.dim), capacity_(capacity), kept_(kept),
      keys_(bytes_for(rounded(capacity)), Pages::small), values_(bytes_for(rounded(capacity)), Pages::small),
      scales_(kept == Kept::i8 ? 2 * layers * shape.kv_heads * rounded(capacity) * sizeof(float) : 0, Pages::small) {}

size_t Sequence::bytes_for(size_t positions) const { return layers_ * kv_heads_ * positions * cache_dim(size_) * kept_bytes(kept_); }

Cache Sequence::cache(size_t layer, size_t head) const {
  const size_t dim = cache_dim(size_), first = (layer * kv_heads_ + head) * rounded(capacity_), offset = first * dim * kept_bytes(kept_);
  float* scale = kept_ == Kept::i8 ? scales_.as<float>() + 2 * first : nullptr;
  return {keys_.data() + offset, values_.data() + offset, scale, scale ? scale + rounded(capacity_) : nullptr, kept_, size_, dim};
}

size_t Sequence::bytes_used() const { return 2 * bytes_for(tiles(length_, kKeyBlock) * kKeyBlock) + (kept_ == Kept::i8 ? 2 * layers_ * kv_heads_ * length_ * sizeof(float) : 0); }

Decoder::Decoder(Architecture shape, std::vector<Rope> tables, Engine with) : architecture(shape), ropes(std::move(tables)), engine(with) {}

size_t Decoder::chunk_tokens() const {
  const size_t attention = (architecture.heads + 2 * architecture.kv_heads) * architecture.dim;
  const size_t numbers = 4 * architecture.hidden + std::max(attention, 2 * architecture.ffn) + architecture.ffn;
  return std::clamp<size_t>(kActivationBytes / (numbers * sizeof(float)), 64, 512);
}

void Decoder::step(std::span<const Piece> pieces, Wanted wanted, float* out) {
  const size_t width = wanted == Wanted::hidden ? architecture.hidden : architecture.vocabulary, hidden = architecture.hidden;
  const size_t most = chunk_tokens();
  size_t written = 0;
  last_.clear();
  std::vector<size_t> done(pieces.size(), 0);
  for (size_t first = 0; first < pieces.size();) {
    std::vector<Piece> now;  // as many tokens as a chunk takes, from as many pieces as that needs
    std::vector<size_t> ends;
    size_t room = most;
    while (first < pieces.size() && room) {
      const size_t count = std::min(room, pieces[first].tokens.size() - done[first]);
      now.push_back({pieces[first].sequence, pieces[first].tokens.subspan(done[first], count)});
      done[first] += count;
      room -= count;
      const bool complete = done[first] == pieces[first].tokens.size();
      if (complete) ends.push_back(most - room - 1), ++first;
    }
    chunk(now);
    const size_t rows = tokens_.size();
    if (wanted == Wanted::last) {
      for (size_t row : ends) last_.insert(last_.end(), x_.data() + row * hidden, x_.data() + (row + 1) * hidden);
    } else {
      finish(x_.data(), rows, wanted, out + written * width);
      written += rows;
    }
  }
  if (wanted == Wanted::last) finish(last_.data(), pieces.size(), wanted, out);
}

void Decoder::chunk(std::span<const Piece> pieces) {
  tokens_.clear();
  std::vector<int32_t> ids;
  for (const Piece& piece : pieces) {
    for (size_t i = 0; i < piece.tokens.size(); ++i) {
      tokens_.push_back({piece.sequence, piece.sequence->length_ + i});
      ids.push_back(piece.tokens[i]);
    }
    piece.sequence->length_ += piece.tokens.size();
  }
  const size_t rows = tokens_.size(), hidden = architecture.hidden;
  float* x = grown(x_, rows * hidden);
  for (size_t row = 0; row < rows; ++row) embedding->copy_row(*engine.ops, static_cast<size_t>(ids[row]), architecture.embedding_scale, x + row * hidden);
  set_angles();
  for (size_t index = 0; index < layers.size(); ++index) {
    attention(layers[index], index);
    mlp(layers[index]);
  }
}

// Cosines and sines of every table for every token: [table][token][2][half].
void Decoder::set_angles() {
  const size_t rows = tokens_.size();
  size_t total = 0;
  for (const Rope& rope : ropes) total += rows * 2 * rope.frequencies.size();
  float* to = grown(angles_, total);
  for (const Rope& rope : ropes)
    for (const Token& token : tokens_) {
      const size_t half = rope.frequencies.size();
      for (size_t i = 0; i < half; ++i) {
        const float angle = static_cast<float>(token.position) * rope.frequencies[i];
        to[i] = std::cos(angle) * rope.factor;
        to[half + i] = std::sin(angle) * rope.factor;
      }
      to += 2 * half;
    }
}

const float* Decoder::angles(size_t table, size_t row) const {
  size_t offset = 0;
  for (size_t i = 0; i < table; ++i) offset += tokens_.size() * 2 * ropes[i].frequencies.size();
  return angles_.data() + offset + row * 2 * ropes[table].frequencies.size();
}

void Decoder::attention(const Layer& layer, size_t index) {
  const size_t rows = tokens_.size(), hidden = architecture.hidden, width = layer.qkv.rows();
  const float* in = normed(layer.attention_norm);
  layer.qkv.multiply(engine, scratch_, in, rows, grown(qkv_, rows * width));
  rotate_and_store(layer, index);
  attend(layer, index);
  layer.out.multiply(engine, scratch_, mixed_.data(), rows, grown(part_, rows * hidden));
  add_normed(layer.attention_out_norm);
}

void Decoder::mlp(const Layer& layer) {
  const size_t rows = tokens_.size(), hidden = architecture.hidden, ffn = architecture.ffn;
  const float* in = normed(layer.mlp_norm);
  layer.gate_up.multiply(engine, scratch_, in, rows, grown(qkv_, rows * 2 * ffn));
  float* gated = grown(gated_, rows * ffn);
  engine.pool->run_rows(rows, [&](size_t row) {
    const float* both = qkv_.data() + row * 2 * ffn;
    engine.ops->gate(architecture.gate, both, both + ffn, ffn, gated + row * ffn);
  });
  layer.down.multiply(engine, scratch_, gated, rows, grown(part_, rows * hidden));
  add_normed(layer.mlp_out_norm);
}

// Norms of heads and rotation in place; keys and values into the cache. Sixteen tokens at a time share a block of keys.
void Decoder::rotate_and_store(const Layer& layer, size_t index) {
  const size_t rows = tokens_.size(), dim = architecture.dim, heads = architecture.heads, kv_heads = architecture.kv_heads;
  const size_t width = layer.qkv.rows(), half = ropes[layer.rope].frequencies.size();
  engine.pool->run(tiles(rows, kKeyBlock), [&](size_t chunk, int) {
    for (size_t row = chunk * kKeyBlock; row < std::min(rows, (chunk + 1) * kKeyBlock); ++row) {
      float* head = qkv_.data() + row * width;
      const float* turn = angles(layer.rope, row);
      for (size_t h = 0; h < heads + kv_heads; ++h, head += dim) {
        const Norm& norm = h < heads ? layer.query_norm : layer.key_norm;
        if (!norm.empty()) engine.ops->rms_norm(head, norm.data(), architecture.eps, dim, head);
        engine.ops->rotate(head, turn, turn + half, half);
      }
      const float* keys = qkv_.data() + row * width + heads * dim;
      for (size_t h = 0; h < kv_heads; ++h) {
        const Token& token = tokens_[row];
        engine.ops->store(token.sequence->cache(index, h), token.position, keys + h * dim, keys + (kv_heads + h) * dim);
      }
    }
  });
}

// Tokens [first, last) of one sequence, one after the other.
struct Decoder::Span {
  size_t first, last;
};

std::vector<Decoder::Span> Decoder::spans(size_t longest) const {
  std::vector<Span> found;
  for (size_t row = 0; row < tokens_.size();) {
    size_t end = row + 1;
    while (end < tokens_.size() && end - row < longest && tokens_[end].sequence == tokens_[row].sequence) ++end;
    found.push_back({row, end});
    row = end;
  }
  return found;
}

void Decoder::attend(const Layer& layer, size_t index) {
  const size_t dim = architecture.dim, group = architecture.heads / architecture.kv_heads, width = layer.qkv.rows();
  const size_t out_width = architecture.heads * dim;
  float* out = grown(mixed_, tokens_.size() * out_width);
  const std::vector<Span> pieces = spans(std::max<size_t>(1, kQueryRows / group));
  const size_t most = std::max<size_t>(kQueryRows, group), scratch = attention_scratch(most, cache_dim(dim));
  float* scratches = grown(attention_scratch_, scratch * static_cast<size_t>(engine.pool->threads()));
  engine.pool->run(pieces.size() * architecture.kv_heads, [&](size_t chunk, int thread) {
    const Span span = pieces[pieces.size() - 1 - chunk / architecture.kv_heads];  // the longest first
    const size_t head = chunk % architecture.kv_heads;
    std::vector<const float*> queries;
    std::vector<float*> outs;
    std::vector<size_t> first, last;
    for (size_t row = span.first; row < span.last; ++row)
      for (size_t g = 0; g < group; ++g) {
        const size_t position = tokens_[row].position;
        queries.push_back(qkv_.data() + row * width + (head * group + g) * dim);
        outs.push_back(out + row * out_width + (head * group + g) * dim);
        first.push_back(layer.window && position >= layer.window ? position + 1 - layer.window : 0);
        last.push_back(position);
      }
    const Attention work{queries.data(), outs.data(), first.data(), last.data(), queries.size(), architecture.attention_scale,
                         architecture.attention_softcap, scratches + scratch * static_cast<size_t>(thread)};
    engine.ops->attend(tokens_[span.first].sequence->cache(index, head), work);
  });
}

const float* Decoder::normed(const Norm& norm) {
  const size_t rows = tokens_.size(), hidden = architecture.hidden;
  if (norm.empty()) return x_.data();
  float* out = grown(normed_, rows * hidden);
  engine.pool->run_rows(rows, [&](size_t row) { engine.ops->rms_norm(x_.data() + row * hidden, norm.data(), architecture.eps, hidden, out + row * hidden); });
  return out;
}

// x += norm(part)
void Decoder::add_normed(const Norm& norm) {
  const size_t hidden = architecture.hidden;
  engine.pool->run_rows(tokens_.size(), [&](size_t row) {
    float* part = part_.data() + row * hidden;
    if (!norm.empty()) engine.ops->rms_norm(part, norm.data(), architecture.eps, hidden, part);
    engine.ops->add(part, hidden, x_.data() + row * hidden);
  });
}

void Decoder::finish(float* rows, size_t count, Wanted wanted, float* out) {
  const size_t hidden = architecture.hidden, vocabulary = architecture.vocabulary;
  engine.pool->run_rows(count, [&](size_t row) { engine.ops->rms_norm(rows + row * hidden, norm.data(), architecture.eps, hidden, rows + row * hidden); });
  if (wanted == Wanted::hidden) {
    std::memcpy(out, rows, count * hidden * sizeof(float));
    return;
  }
  head->multiply(engine, scratch_, rows, count, out, vocabulary);
  if (const float cap = architecture.logit_softcap; cap > 0)
    engine.pool->run_rows(count, [&](size_t row) {
      for (size_t v = 0; v < vocabulary; ++v) out[row * vocabulary + v] = cap * std::tanh(out[row * vocabulary + v] / cap);
    });
}

}  // namespace qhub
