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

// A norm of rows, of sums of rows with `delta`.
struct NormArgs {
    uint d;         // elements of a row
    uint x_row;     // elements from one row of x to the next
    uint delta_row; // the same of delta
    float eps;
};
static_assert(sizeof(NormArgs) == 16, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(NormArgs, eps) == 12, "as in src/metal/args.rs");

// Rotary position embedding.
struct RopeArgs {
    uint heads;
    uint pairs;   // of a head
    uint x_token; // elements from one token to the next
    uint x_head;  // elements from one head to the next
    uint cos_row; // elements from one token's cosines to the next's
    uint sin_row;
};
static_assert(sizeof(RopeArgs) == 24, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(RopeArgs, cos_row) == 16, "as in src/metal/args.rs");

// What MLA keeps of a token, and its queries.
struct LatentArgs {
    uint latent;  // elements that are normalised
    uint pairs;   // that are turned, of kv and of each head of queries
    uint kv_row;  // elements from one token to the next
    uint cos_row;
    uint sin_row;
    uint heads;   // of queries
    uint q_token;
    uint q_head;
    float eps;
};
static_assert(sizeof(LatentArgs) == 36, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(LatentArgs, cos_row) == 12, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(LatentArgs, heads) == 20, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(LatentArgs, eps) == 32, "as in src/metal/args.rs");

// A sum of rows.
struct AddArgs {
    uint d;
    uint x_row;
    uint delta_row;
};
static_assert(sizeof(AddArgs) == 12, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(AddArgs, delta_row) == 8, "as in src/metal/args.rs");

// A product with a weight in floating point; as LinearArgs.
struct DenseArgs {
    uint m;
    uint n;
    uint k;
    uint x_row;
    uint x_head;
    uint y_row;
    uint y_head;
    uint weight_row;
    uint weight_head;
};
static_assert(sizeof(DenseArgs) == 36, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(DenseArgs, x_row) == 12, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(DenseArgs, weight_row) == 28, "as in src/metal/args.rs");
