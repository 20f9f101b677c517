// Fake quantization (matquant/fake.py has the formulas): weights as one width would read them, and gradients for all that they are made of.
//
//     q = clamp(floor(w / s + z + 1/2), 0, max_code)      p = q without its last `cut` planes, rounded half up or not
//     w_r = s (m level + mid - u),      level = step p + added
//
// Rounded as torch rounds: a quotient, a sum and a product each by itself. Groups do not interact. Threads share them; a group's arithmetic
// is the same for any number of threads.
#pragma once
#include "layout.h"

extern "C" {

struct mq_fake {
    int64_t groups, size;                        // weights of a group lie one after another
    int64_t max_code, cut, half_up, top, under;  // top: what rounding up may reach; under: the first code that a clamp changes
    float step, added, mid;
    const float *w;                              // [group][size]
    const float *scale, *zero, *m, *u;           // [group]; m and u null: 1 and zero
};

MQ_PUBLIC void mq_fake_read(const mq_fake *fake, float *read, int64_t threads);

// From g, that of the read. dw: null if it is not wanted. dm, du: null without m and u; dz is then of both.
MQ_PUBLIC void mq_fake_gradients(const mq_fake *fake, const float *g, float *dw, float *ds, float *dz, float *dm, float *du, int64_t threads);
}
