#include "step.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <thread>

#include "inputs.h"
#include "maths.h"

namespace {

// All threads of a step wait here for each other some hundred times a token: longer than a moment, they let others run.
class Barrier {
  public:
    explicit Barrier(int threads) : threads_(threads) {}

    void wait() {
        const int turn = turn_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
            arrived_.store(0, std::memory_order_relaxed);
            turn_.store(turn + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins)
            if (spins > SPINS) std::this_thread::yield();
    }

  private:
    static constexpr int SPINS = 4000;
    const int threads_;
    std::atomic<int> arrived_{0}, turn_{0};
};

MQ_CLONES float dot(const float *a, const float *b, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
    return sum;
}

// x / sqrt(mean x^2 + eps) * weight, of n numbers.
MQ_CLONES void normalize(const float *x, const float *weight, float eps, float *to, int64_t n) {
    const float one = 1 / std::sqrt(dot(x, x, n) / float(n) + eps);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = x[i] * one * weight[i];
}

MQ_CLONES void sum_of(const float *a, const float *b, float *to, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = a[i] + b[i];
}

// act(gate) * up.
MQ_CLONES void gated(const float *gate, const float *up, int64_t act, float *to, int64_t n) {
    if (act) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] = gelu(gate[i]) * up[i];
    } else {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] = silu(gate[i]) * up[i];
    }
}

// The softmax of two chunks from theirs: (out, largest, total) and the other's, both [padded + 2], to the first.
MQ_CLONES void merge(float *to, const float *other, int64_t padded) {
    const float largest = std::max(to[padded], other[padded]), own = exp_of(to[padded] - largest), its = exp_of(other[padded] - largest);
#pragma omp simd
    for (int64_t i = 0; i < padded; ++i) to[i] = to[i] * own + other[i] * its;
    to[padded] = largest;
    to[padded + 1] = to[padded + 1] * own + other[padded + 1] * its;
}

// The halves of a head turned against each other by the position's angles; what lies behind 2 `rotary` numbers stays.
void rotate(const float *x, const float *cosine, const float *sine, int64_t rotary, int64_t size, float *to) {
    for (int64_t i = 0; i < rotary; ++i) {
        to[i] = x[i] * cosine[i] - x[rotary + i] * sine[i];
        to[rotary + i] = x[rotary + i] * cosine[i] + x[i] * sine[i];
    }
    for (int64_t i = 2 * rotary; i < size; ++i) to[i] = x[i];
}

using Floats = std::vector<float>;

// Inputs that products share.
enum Input { IN_QKV, IN_O, IN_UP, IN_DOWN, IN_HEAD, INPUTS };

constexpr int64_t QUERIES = 16;  // that pass over a chunk of keys together: its keys and values stay in the first-level cache
constexpr int64_t UNITS = 4;     // rows' heads for each thread, of fewer of which the chunks are shared

// Rows of a pass at neighbouring positions of one sequence. Their queries are multiplied together.
struct Rows {
    int64_t first, count, chunks;
    size_t at;  // of their partial results, where chunks are shared among threads
};

struct Step {
    const mq_model &model;
    const uint8_t *bits;
    int64_t m;
    const int32_t *sequence, *position;
    float *keys, *values;
    int64_t sequences, capacity;
    int threads;
    const Isa &isa;
    bool exact;
    const Heads heads;
    std::vector<Rows> rows;
    bool split;  // chunks are shared among threads: where there are few rows
    Floats x, other, y, q, k, v, attended, gate, up, cosine, sine, whole, parts;
    Rounded rounded[INPUTS];
    Barrier barrier;

    Step(const mq_model &model, const uint8_t *bits, int64_t m, const float *from, const int32_t *sequence, const int32_t *position, float *keys,
         float *values, int64_t sequences, int64_t capacity, int64_t wanted, int threads, const Isa &isa, bool exact)
        : model(model), bits(bits), m(m), sequence(sequence), position(position), keys(keys), values(values), sequences(sequences), capacity(capacity),
          threads(threads), isa(isa), exact(exact), heads{model.head_size, (model.head_size + KEYS - 1) / KEYS * KEYS, model.scaling},
          x(from, from + m * model.hidden), other(x.size()), y(x.size()), whole(size_t(std::max(m, wanted) * model.hidden)), barrier(threads) {
        const int64_t of_heads = m * model.heads * model.head_size, of_kv = m * model.kv_heads * model.head_size;
        q.resize(size_t(of_heads)), attended.resize(size_t(of_heads)), k.resize(size_t(of_kv)), v.resize(size_t(of_kv));
        gate.resize(size_t(m * model.inner)), up.resize(gate.size());
        cosine.resize(size_t(m * model.rotary)), sine.resize(cosine.size());
        for (int64_t row = 0; row < m; ++row)
            for (int64_t i = 0; i < model.rotary; ++i) {
                const float angle = float(position[row]) * model.inv_freq[i];
                cosine[size_t(row * model.rotary + i)] = std::cos(angle) * model.rotary_scaling;
                sine[size_t(row * model.rotary + i)] = std::sin(angle) * model.rotary_scaling;
            }
        group_rows();
        const mq_block &first = model.blocks[0];
        const mq_weight *takers[] = {first.weight[MQ_Q], first.weight[MQ_O], first.weight[MQ_GATE], first.weight[MQ_DOWN]};
        for (int i = 0; i < IN_HEAD; ++i) rounded[i].shape(*takers[i], m, exact);
        rounded[IN_HEAD].shape(*model.head, wanted, exact);
    }

    void group_rows() {
        const int64_t share = model.heads / model.kv_heads, most = std::max<int64_t>(1, QUERIES / share);
        size_t at = 0;
        for (int64_t row = 0, end; row < m; row = end) {
            for (end = row + 1; end < m && end < row + most && sequence[end] == sequence[row] && position[end] == position[end - 1] + 1; ++end) {}
            const int64_t chunks = position[end - 1] / CHUNK + 1;
            rows.push_back({row, end - row, chunks, at});
            at += size_t(model.kv_heads * chunks * (end - row) * share * (heads.padded + 2));
        }
        split = int64_t(rows.size()) * model.kv_heads < UNITS * threads;
        if (split) parts.resize(at);
    }

    // This thread's share of `units`, called by all threads; all of them are done when it returns.
    template <class Work>
    void shared(int thread, int64_t units, Work work) {
        for (int64_t unit = units * thread / threads; unit < units * (thread + 1) / threads; ++unit) work(unit);
        barrier.wait();
    }

    // The same, every so many-th unit: where later ones take longer.
    template <class Work>
    void dealt(int thread, int64_t units, Work work) {
        for (int64_t unit = thread; unit < units; unit += threads) work(unit);
        barrier.wait();
    }

    // Room for the inputs of `w`, whose groups may differ from the first layer's; of all threads one makes it.
    Rounded &room(int thread, const mq_weight &w, Input of) {
        Rounded &own = rounded[of];
        if (!own.fits(w)) {
            barrier.wait();
            if (thread == 0) own.shape(w, m, exact);
            barrier.wait();
        }
        return own;
    }

    // Rounded inputs of `w` from rows of floats.
    void round(int thread, const mq_weight &w, Input of, const float *from) {
        Rounded &own = room(thread, w, of);
        shared(thread, own.inputs.m * w.groups, [&](int64_t unit) {
            const int64_t row = unit / w.groups, g = unit % w.groups;
            own.fill(row, g, from + row * w.in + g * w.group);
        });
    }

    // Products of the same inputs with several weights, their tiles one after another.
    struct Product {
        const mq_weight *w;
        int64_t tiles;
        int bits;
        const float *bias;
        float *to;
    };
    void multiply(int thread, Input of, std::initializer_list<Product> products) {
        int64_t tiles = 0;
        for (const Product &p : products) tiles += p.tiles;
        const int64_t first = tiles * thread / threads, last = tiles * (thread + 1) / threads;
        int64_t before = 0;
        for (const Product &p : products) {
            const int64_t from = std::max<int64_t>(first - before, 0), until = std::min(last - before, p.tiles);
            if (from < until) isa.linear(*p.w, p.bits, rounded[of].inputs, p.bias, p.to, from, until);
            before += p.tiles;
        }
        barrier.wait();
    }

    Product part(int64_t layer, mq_part which, Floats &to) const {
        const mq_block &block = model.blocks[layer];
        return {block.weight[which], block.weight[which]->tiles, bits[layer * MQ_PARTS + which], block.bias[which], to.data()};
    }

    // x = x + y, if that is to be added, and its norm, rounded for `w`. One row each thread normalizes for itself, which is faster than waiting for
    // the one that does; the sum goes to `other`, as some may still read x.
    void add_and_round(int thread, const mq_weight &w, Input of, const float *weight, bool add, float *&own, float *&next) {
        const int64_t n = model.hidden;
        if (m > 1) {
            shared(thread, m, [&](int64_t row) {
                if (add) sum_of(own + row * n, &y[size_t(row * n)], own + row * n, n);
                normalize(own + row * n, weight, model.eps, &whole[size_t(row * n)], n);
            });
            return round(thread, w, of, whole.data());
        }
        Floats sum(size_t(n), 0.0f), normed(size_t(n), 0.0f);
        if (add) sum_of(own, y.data(), sum.data(), n);
        else std::copy_n(own, n, sum.begin());
        normalize(sum.data(), weight, model.eps, normed.data(), n);
        if (thread == 0) std::copy_n(sum.begin(), n, next);
        std::swap(own, next);
        round(thread, w, of, normed.data());
    }

    // Of one sequence's head: where its keys or values begin.
    float *cached(float *cache, int64_t width, int64_t layer, int64_t row, int64_t kv) const {
        return cache + ((layer * sequences + sequence[row]) * model.kv_heads + kv) * ((capacity + CHUNK - 1) / CHUNK * CHUNK) * width;
    }

    // Queries turned where they are; keys, turned, and values to the cache.
    void turn(int thread, int64_t layer) {
        const mq_block &block = model.blocks[layer];
        const int64_t size = model.head_size, each = model.heads + model.kv_heads;
        Floats head(size_t(size), 0.0f), turned(size_t(size), 0.0f);
        shared(thread, m * each, [&](int64_t unit) {
            const int64_t row = unit / each, of = unit % each, kv = of - model.heads;
            float *own = kv < 0 ? &q[size_t((row * model.heads + of) * size)] : &k[size_t((row * model.kv_heads + kv) * size)];
            const float *from = own, *norm = kv < 0 ? block.norm_q : block.norm_k;
            if (norm) normalize(own, norm, model.eps, head.data(), size), from = head.data();
            rotate(from, &cosine[size_t(row * model.rotary)], &sine[size_t(row * model.rotary)], model.rotary, size, turned.data());
            if (kv < 0) return void(std::memcpy(own, turned.data(), size_t(size) * sizeof(float)));
            float *key = cached(keys, size, layer, row, kv) + position[row] / KEYS * KEYS * size + position[row] % KEYS;
            for (int64_t j = 0; j < size; ++j) key[j * KEYS] = turned[size_t(j)];
            float *value = cached(values, heads.padded, layer, row, kv) + position[row] * heads.padded;
            std::memcpy(value, &v[size_t((row * model.kv_heads + kv) * size)], size_t(size) * sizeof(float));
            std::fill(value + size, value + heads.padded, 0.0f);
        });
    }

    // One chunk of some rows and the queries that share a head of keys: those that reach it, to [row][query of the head][padded + 2].
    void attend_to_chunk(const Rows &of, int64_t layer, int64_t kv, int64_t chunk, float *to) {
        const int64_t share = model.heads / model.kv_heads, start = chunk * CHUNK;
        const float *from[QUERIES], *own_keys = cached(keys, heads.size, layer, of.first, kv) + start * heads.size;
        float *result[QUERIES];
        int64_t counts[QUERIES];
        for (int64_t head = 0; head < share; head += QUERIES) {
            int64_t n = 0;
            for (int64_t row = of.first; row < of.first + of.count; ++row)
                for (int64_t i = head; i < std::min(share, head + QUERIES) && position[row] >= start; ++i, ++n) {
                    from[n] = &q[size_t((row * model.heads + kv * share + i) * heads.size)];
                    counts[n] = std::min(position[row] - start + 1, CHUNK);
                    result[n] = to + ((row - of.first) * share + i) * (heads.padded + 2);
                }
            isa.attend(from, n, counts, own_keys, cached(values, heads.padded, layer, of.first, kv) + start * heads.padded, heads, result);
        }
    }

    // out / total of a query, from its merged chunks.
    void finish(const float *from, int64_t row, int64_t head) {
        float *to = &attended[size_t((row * model.heads + head) * heads.size)];
        for (int64_t i = 0; i < heads.size; ++i) to[i] = from[i] / from[heads.padded + 1];
    }

    void attend(int thread, int64_t layer) {
        const int64_t share = model.heads / model.kv_heads, one = heads.padded + 2;
        turn(thread, layer);
        if (!split) {
            Floats merged, next;
            dealt(thread, int64_t(rows.size()) * model.kv_heads, [&](int64_t unit) {
                const Rows &of = rows[size_t(unit / model.kv_heads)];
                const int64_t kv = unit % model.kv_heads, queries = of.count * share;
                merged.resize(size_t(queries * one)), next.resize(merged.size());
                for (int64_t chunk = 0; chunk < of.chunks; ++chunk) {
                    attend_to_chunk(of, layer, kv, chunk, chunk ? next.data() : merged.data());
                    for (int64_t i = 0; chunk && i < queries; ++i)
                        if (position[of.first + i / share] >= chunk * CHUNK) merge(&merged[size_t(i * one)], &next[size_t(i * one)], heads.padded);
                }
                for (int64_t i = 0; i < queries; ++i) finish(&merged[size_t(i * one)], of.first + i / share, kv * share + i % share);
            });
            return;
        }
        int64_t unit = 0;
        for (const Rows &of : rows)
            for (int64_t kv = 0; kv < model.kv_heads; ++kv)
                for (int64_t chunk = 0; chunk < of.chunks; ++chunk)
                    if (unit++ % threads == thread)
                        attend_to_chunk(of, layer, kv, chunk, &parts[of.at + size_t((kv * of.chunks + chunk) * of.count * share * one)]);
        barrier.wait();
        for (const Rows &of : rows)
            for (int64_t i = thread; i < of.count * model.heads; i += threads) {
                const int64_t row = i / model.heads, head = i % model.heads, kv = head / share;
                float *first = &parts[of.at + size_t((kv * of.chunks * of.count + row) * share + head % share) * size_t(one)];
                for (int64_t chunk = 1; chunk * CHUNK <= position[of.first + row]; ++chunk) merge(first, first + chunk * of.count * share * one, heads.padded);
                finish(first, of.first + row, head);
            }
        barrier.wait();
    }

    // words: of the vocabulary, the first so many, that there are to be logits of.
    void run(int thread, int64_t wanted, const int32_t *wanted_rows, int64_t words, float *logits) {
        float *own = x.data(), *next = other.data();
        for (int64_t layer = 0; layer < model.layers; ++layer) {
            const mq_block &block = model.blocks[layer];
            add_and_round(thread, *block.weight[MQ_Q], IN_QKV, block.norm_in, layer > 0, own, next);
            multiply(thread, IN_QKV, {part(layer, MQ_Q, q), part(layer, MQ_K, k), part(layer, MQ_V, v)});
            attend(thread, layer);
            round(thread, *block.weight[MQ_O], IN_O, attended.data());
            multiply(thread, IN_O, {part(layer, MQ_O, y)});
            add_and_round(thread, *block.weight[MQ_GATE], IN_UP, block.norm_mid, true, own, next);
            multiply(thread, IN_UP, {part(layer, MQ_GATE, gate), part(layer, MQ_UP, up)});
            const mq_weight &down = *block.weight[MQ_DOWN];
            Rounded &inputs = room(thread, down, IN_DOWN);
            shared(thread, m * down.groups, [&](int64_t unit) {
                const int64_t row = unit / down.groups, g = unit % down.groups, at = row * model.inner + g * down.group;
                gated(&gate[size_t(at)], &up[size_t(at)], model.act, &gate[size_t(at)], down.group);
                inputs.fill(row, g, &gate[size_t(at)]);
            });
            multiply(thread, IN_DOWN, {part(layer, MQ_DOWN, y)});
        }
        const mq_weight &head = *model.head;
        shared(thread, wanted, [&](int64_t i) {
            const int64_t at = wanted_rows[i] * model.hidden;
            sum_of(own + at, &y[size_t(at)], next + at, model.hidden);
            normalize(next + at, model.norm_out, model.eps, &whole[size_t(i * model.hidden)], model.hidden);
        });
        round(thread, head, IN_HEAD, whole.data());
        if (wanted) multiply(thread, IN_HEAD, {{&head, std::min(head.tiles, (words + head.lanes - 1) / head.lanes), bits[model.layers * MQ_PARTS], nullptr, logits}});
    }
};

}  // namespace

int mq_step(const mq_model *model, const uint8_t *bits, int64_t m, const float *x, const int32_t *sequence, const int32_t *position, float *keys,
            float *values, int64_t sequences, int64_t capacity, int64_t wanted, const int32_t *rows, int64_t words, float *logits, int64_t exact,
            int64_t threads, const char *isa) {
    const Isa *found = find_isa(isa);
    if (!found) return 1;
    for (int64_t i = 0; i < model->layers * MQ_PARTS; ++i)
        if (!holds(*model->blocks[i / MQ_PARTS].weight[i % MQ_PARTS], bits[i])) return 2;
    if (wanted && !holds(*model->head, bits[model->layers * MQ_PARTS])) return 2;
    for (int64_t row = 0; row < m; ++row)
        if (position[row] < 0 || position[row] >= capacity || sequence[row] < 0 || sequence[row] >= sequences) return 3;
    for (int64_t i = 0; i < wanted; ++i)
        if (rows[i] < 0 || rows[i] >= m) return 4;
    std::optional<Step> step;
#pragma omp parallel num_threads(int(std::max<int64_t>(threads, 1)))
    {
#pragma omp single  // for as many threads as there are, not as were asked for: all of them must come to every barrier
        step.emplace(*model, bits, m, x, sequence, position, keys, values, sequences, capacity, wanted, omp_get_num_threads(), *found, exact != 0);
        step->run(omp_get_thread_num(), wanted, rows, words, logits);
    }
    return 0;
}
