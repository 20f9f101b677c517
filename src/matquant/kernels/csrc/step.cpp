#include "step.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
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

// softmax(scaling q k_i) v_i over n positions of `size` numbers each. scores: room for n.
MQ_CLONES void attend_one(const float *q, const float *keys, const float *values, int64_t n, int64_t size, float scaling, float *scores, float *to) {
    float largest = -INFINITY, total = 0;
    for (int64_t i = 0; i < n; ++i) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < size; ++j) sum += q[j] * keys[i * size + j];
        scores[i] = sum * scaling;
        largest = std::max(largest, scores[i]);
    }
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; ++i) scores[i] = exp_of(scores[i] - largest), total += scores[i];
    for (int64_t j = 0; j < size; ++j) to[j] = 0;
    for (int64_t i = 0; i < n; ++i) {
        const float weight = scores[i] / total;
#pragma omp simd
        for (int64_t j = 0; j < size; ++j) to[j] += weight * values[i * size + j];
    }
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
    Floats x, next, y, q, k, v, attended, gate, up, inner, cosine, sine, whole;
    Rounded rounded;
    Barrier barrier;

    Step(const mq_model &model, const uint8_t *bits, int64_t m, const float *from, const int32_t *sequence, const int32_t *position, float *keys,
         float *values, int64_t sequences, int64_t capacity, int threads, const Isa &isa, bool exact)
        : model(model), bits(bits), m(m), sequence(sequence), position(position), keys(keys), values(values), sequences(sequences), capacity(capacity),
          threads(threads), isa(isa), exact(exact), x(from, from + m * model.hidden), next(x.size()), y(x.size()), whole(x.size()), barrier(threads) {
        const int64_t of_heads = m * model.heads * model.head_size, of_kv = m * model.kv_heads * model.head_size;
        q.resize(size_t(of_heads)), attended.resize(size_t(of_heads)), k.resize(size_t(of_kv)), v.resize(size_t(of_kv));
        gate.resize(size_t(m * model.inner)), up.resize(gate.size()), inner.resize(gate.size());
        cosine.resize(size_t(m * model.rotary)), sine.resize(cosine.size());
        for (int64_t row = 0; row < m; ++row)
            for (int64_t i = 0; i < model.rotary; ++i) {
                const float angle = float(position[row]) * model.inv_freq[i];
                cosine[size_t(row * model.rotary + i)] = std::cos(angle) * model.rotary_scaling;
                sine[size_t(row * model.rotary + i)] = std::sin(angle) * model.rotary_scaling;
            }
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

    // Room for the inputs of a product; of all threads one makes it.
    void make_room(int thread, const mq_weight &w) {
        if (thread == 0) rounded.shape(w, m, exact);
        barrier.wait();
    }

    // Rounded inputs from rows of floats.
    void round(int thread, const mq_weight &w, const float *from) {
        make_room(thread, w);
        shared(thread, m * w.groups, [&](int64_t unit) {
            const int64_t row = unit / w.groups, g = unit % w.groups;
            rounded.fill(row, g, from + row * w.in + g * w.group);
        });
    }

    // Products of the same inputs with several weights, their tiles one after another.
    struct Product {
        const mq_weight *w;
        int bits;
        const float *bias;
        float *to;
    };
    void multiply(int thread, std::initializer_list<Product> products) {
        int64_t tiles = 0;
        for (const Product &p : products) tiles += p.w->tiles;
        const int64_t first = tiles * thread / threads, last = tiles * (thread + 1) / threads;
        int64_t before = 0;
        for (const Product &p : products) {
            const int64_t from = std::max<int64_t>(first - before, 0), until = std::min(last - before, p.w->tiles);
            if (from < until) isa.linear(*p.w, p.bits, rounded.inputs, p.bias, p.to, from, until);
            before += p.w->tiles;
        }
        barrier.wait();
    }

    Product part(int64_t layer, mq_part which, Floats &to) const {
        const mq_block &block = model.blocks[layer];
        return {block.weight[which], bits[layer * MQ_PARTS + which], block.bias[which], to.data()};
    }

    // x = x + y, and its norm, to `whole`.
    void add_and_normalize(int thread, const float *weight, bool add) {
        const int64_t n = model.hidden;
        shared(thread, m, [&](int64_t row) {
            float *own = &x[size_t(row * n)];
            if (add) sum_of(own, &y[size_t(row * n)], own, n);
            normalize(own, weight, model.eps, &whole[size_t(row * n)], n);
        });
    }

    float *cached(float *cache, int64_t layer, int64_t row, int64_t head, int64_t at) const {
        return cache + (((layer * sequences + sequence[row]) * model.kv_heads + head) * capacity + at) * model.head_size;
    }

    void attend(int thread, int64_t layer) {
        const mq_block &block = model.blocks[layer];
        const int64_t size = model.head_size, share = model.heads / model.kv_heads;
        Floats head(size_t(size), 0.0f), turned(size_t(size), 0.0f), scores;
        shared(thread, m * model.kv_heads, [&](int64_t unit) {
            const int64_t row = unit / model.kv_heads, kv = unit % model.kv_heads;
            const float *own = &k[size_t(unit * size)];
            if (block.norm_k) normalize(own, block.norm_k, model.eps, head.data(), size), own = head.data();
            rotate(own, &cosine[size_t(row * model.rotary)], &sine[size_t(row * model.rotary)], model.rotary, size, cached(keys, layer, row, kv, position[row]));
            std::memcpy(cached(values, layer, row, kv, position[row]), &v[size_t(unit * size)], size_t(size) * sizeof(float));
        });
        dealt(thread, m * model.heads, [&](int64_t unit) {
            const int64_t row = unit / model.heads, kv = unit % model.heads / share, length = position[row] + 1;
            const float *own = &q[size_t(unit * size)];
            if (block.norm_q) normalize(own, block.norm_q, model.eps, head.data(), size), own = head.data();
            rotate(own, &cosine[size_t(row * model.rotary)], &sine[size_t(row * model.rotary)], model.rotary, size, turned.data());
            scores.resize(size_t(length));
            attend_one(turned.data(), cached(keys, layer, row, kv, 0), cached(values, layer, row, kv, 0), length, size, model.scaling, scores.data(),
                       &attended[size_t(unit * size)]);
        });
    }

    void run(int thread, int64_t wanted, const int32_t *rows, float *logits) {
        for (int64_t layer = 0; layer < model.layers; ++layer) {
            const mq_block &block = model.blocks[layer];
            add_and_normalize(thread, block.norm_in, layer > 0);
            round(thread, *block.weight[MQ_Q], whole.data());
            multiply(thread, {part(layer, MQ_Q, q), part(layer, MQ_K, k), part(layer, MQ_V, v)});
            attend(thread, layer);
            round(thread, *block.weight[MQ_O], attended.data());
            multiply(thread, {part(layer, MQ_O, y)});
            add_and_normalize(thread, block.norm_mid, true);
            round(thread, *block.weight[MQ_GATE], whole.data());
            multiply(thread, {part(layer, MQ_GATE, gate), part(layer, MQ_UP, up)});
            const mq_weight &down = *block.weight[MQ_DOWN];
            make_room(thread, down);
            shared(thread, m * down.groups, [&](int64_t unit) {
                const int64_t row = unit / down.groups, g = unit % down.groups, at = row * model.inner + g * down.group;
                gated(&gate[size_t(at)], &up[size_t(at)], model.act, &inner[size_t(at)], down.group);
                rounded.fill(row, g, &inner[size_t(at)]);
            });
            multiply(thread, {part(layer, MQ_DOWN, y)});
        }
        add_and_normalize(thread, model.norm_out, true);
        if (thread == 0) {
            rounded.shape(*model.head, wanted, exact);
            for (int64_t i = 0; i < wanted; ++i)
                for (int64_t g = 0; g < rounded.groups; ++g) rounded.fill(i, g, &whole[size_t(rows[i] * model.hidden + g * rounded.group)]);
        }
        barrier.wait();
        if (wanted) multiply(thread, {{model.head, bits[model.layers * MQ_PARTS], nullptr, logits}});
    }
};

}  // namespace

int mq_step(const mq_model *model, const uint8_t *bits, int64_t m, const float *x, const int32_t *sequence, const int32_t *position, float *keys,
            float *values, int64_t sequences, int64_t capacity, int64_t wanted, const int32_t *rows, float *logits, int64_t exact, int64_t threads,
            const char *isa) {
    const Isa *found = find_isa(isa);
    if (!found) return 1;
    for (int64_t i = 0; i < model->layers * MQ_PARTS; ++i)
        if (!holds(*model->blocks[i / MQ_PARTS].weight[i % MQ_PARTS], bits[i])) return 2;
    for (int64_t row = 0; row < m; ++row)
        if (position[row] < 0 || position[row] >= capacity || sequence[row] < 0 || sequence[row] >= sequences) return 3;
    int team = 1;  // as many threads as there will be, not as were asked for: all of them must come to every barrier
#pragma omp parallel num_threads(int(std::max<int64_t>(threads, 1)))
#pragma omp single
    team = omp_get_num_threads();
    Step step(*model, bits, m, x, sequence, position, keys, values, sequences, capacity, team, *found, exact != 0);
#pragma omp parallel num_threads(team)
    step.run(omp_get_thread_num(), wanted, rows, logits);
    return 0;
}
