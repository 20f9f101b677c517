// Codes of a block of columns, one column after another (kernels/turns.py has the formulas):
//
//     x_j = start_j - sum over k < j of coupling_jk p_k          of each stream
//     q_j = argmin over q of sum over streams of weight count_j ((x_j - offset) / scale - table[q])^2
//     p_j = factor_j (offset + scale table[q_j] - origin_j)
//
// Rows do not interact. Threads share them; each row's arithmetic is the same for any number of threads.
#pragma once
#include "layout.h"

extern "C" {

struct mq_turns {
    int64_t streams, columns, rows, groups;
    const float *start;                   // [stream][column][row]
    int64_t start_stride;                 // from stream to stream
    const float *origin;                  // the same; null: x_j
    int64_t origin_stride;
    const float *coupling;                // [stream][column][column]
    const float *count, *factor;          // [stream][column]
    const float *scale, *offset, *weight; // [stream][group][row]
    const int64_t *group;                 // [column]
    const float *table;                   // [stream][code]: sliced codes
    int64_t codes;
    // A code is prefix * residuals + e. The last stream's sliced code is base[prefix] + e, that of the others depends on the prefix alone.
    const float *below;                   // [stream but the last][prefix]
    const float *base;                    // [prefix]
    int64_t prefixes, residuals;
    int64_t last_counts;                  // 0: the last stream only breaks ties
    int64_t choices;                      // prefixes to choose among: those that share the prefix of `now` divided by it
    const uint8_t *shared;                // [stream]: p is the mean over those that are 1 before the factor; null: each has its own
    const uint8_t *now;                   // [column][row]
    uint8_t *chosen;                      // [column][row]
    float *passed;                        // p: [stream][column][row]
};

// Returns 1 for more streams than it has room for, else 0.
MQ_PUBLIC int mq_choose_in_turn(const mq_turns *turns, int64_t threads);
}
