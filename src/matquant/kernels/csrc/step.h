// One pass of some tokens through a whole model of Llama's shape, in one call:
//
//     h = x + Wo attention(norm(x));   x' = h + Wdown (act(Wgate norm(h)) * Wup norm(h))
//
// with grouped heads, rotary positions, and where the model has them biases and norms of queries and keys. Every row is a token of some sequence
// at some position; its keys and values go to that sequence's cache before any row attends. Each row's arithmetic is the same whatever
// other rows there are and however many threads.
#pragma once
#include "layout.h"

extern "C" {

enum mq_part { MQ_Q, MQ_K, MQ_V, MQ_O, MQ_GATE, MQ_UP, MQ_DOWN, MQ_PARTS };

struct mq_block {
    const mq_weight *weight[MQ_PARTS];
    const float *bias[MQ_PARTS];        // or null
    const float *norm_in, *norm_mid;    // before attention, before the feed-forward layer
    const float *norm_q, *norm_k;       // of each head, or null
};

struct mq_model {
    int64_t layers, hidden, inner, heads, kv_heads, head_size, vocabulary;
    int64_t rotary;                     // pairs of a head that turn
    int64_t act;                        // 0: silu, 1: gelu (tanh)
    float eps, scaling, rotary_scaling; // of norms; of scores; of cosines and sines
    const float *inv_freq;              // [rotary]
    const mq_block *blocks;             // [layers]
    const float *norm_out;
    const mq_weight *head;
};

// x: embeddings [m][hidden]. bits: [layers][MQ_PARTS], then the head's. sequence, position: [m]. keys, values: attention.h, with the
// capacity rounded up to whole chunks. logits: [wanted][vocabulary] of the rows in `rows`, and
// of the first `words` of the vocabulary, or a few more; the others are left as they are. Returns as mq_linear; 3 for a position beyond the capacity, 4 for a row that is not there.
MQ_PUBLIC int mq_step(const mq_model *model, const uint8_t *bits, int64_t m, const float *x, const int32_t *sequence, const int32_t *position, float *keys,
                      float *values, int64_t sequences, int64_t capacity, int64_t wanted, const int32_t *rows, int64_t words, float *logits,
                      int64_t exact, int64_t threads, const char *isa);
}
