// Arguments of the kernels, as the host writes them: src/metal/args.rs mirrors each struct and asserts the same size and
// offsets.
#pragma once

#include <metal_stdlib>

// A product with a weight, or with each head's rows of one. Without heads there is one head.
struct LinearArgs {
    uint m;           // rows of activations
    uint n;           // rows of the weight a head has
    uint k;           // columns of the weight, a multiple of the group
    uint x_row;       // elements from one row of activations to the next
    uint x_head;      // elements from one head's activations to the next's
    uint y_row;       // the same of the output
    uint y_head;
    uint weight_row;  // the first head's first row of the weight
    uint weight_head; // rows of the weight from one head's first to the next's
    float factor;     // what every scale is multiplied or divided by
    uint second_n;    // with JOINED: rows of the second weight
    float second_factor;
    float eps;        // with NORMED: what is added to the mean square
};
static_assert(sizeof(LinearArgs) == 52, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(LinearArgs, x_row) == 12, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(LinearArgs, y_row) == 20, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(LinearArgs, weight_row) == 28, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(LinearArgs, factor) == 36, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(LinearArgs, second_n) == 40, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(LinearArgs, eps) == 48, "as in src/metal/args.rs");
