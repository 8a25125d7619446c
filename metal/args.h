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
    uint second_n; // with JOINED: rows of the second weight
};
static_assert(sizeof(DenseArgs) == 40, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(DenseArgs, x_row) == 12, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(DenseArgs, weight_row) == 28, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(DenseArgs, second_n) == 36, "as in src/metal/args.rs");

// A product with what attention's parts come to, each token's heads; the rows of the weight as of LinearArgs.
struct MergedArgs {
    uint m;           // tokens
    uint n;           // rows of the weight a head has
    uint k;           // columns of the weight and of a part
    uint heads;
    uint splits;      // parts of each
    uint weight_row;
    uint weight_head;
    float factor;     // of a weight in FP4
};
static_assert(sizeof(MergedArgs) == 32, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(MergedArgs, splits) == 16, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(MergedArgs, factor) == 28, "as in src/metal/args.rs");

// The router of a mixture of experts.
struct RouterArgs {
    uint tokens;
    uint experts;
    uint d;             // columns of the weight
    uint x_row;         // elements from one token's activations to the next's
    uint top_k;
    uint groups;        // that the experts are divided into
    uint chosen_groups; // whose experts may be chosen
    uint normalize;     // whether weights are divided by their sum
    float scaling;      // what they are multiplied by
};
static_assert(sizeof(RouterArgs) == 36, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(RouterArgs, x_row) == 12, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(RouterArgs, groups) == 20, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(RouterArgs, scaling) == 32, "as in src/metal/args.rs");

// A mixture of experts: routed ones, and after them shared ones, which every token goes to. A token has a slot for each of the
// experts that it goes to: first the routed ones, in the order of its ids.
struct MoeArgs {
    uint tokens;
    uint d;            // elements of a token
    uint x_row;        // elements from one token's activations to the next's
    uint experts;      // routed ones
    uint shared;       // shared ones
    uint top_k;        // routed experts that a token goes to
    uint width;        // of a routed expert
    uint shared_width; // of a shared one
    uint h_row;        // elements from one slot's gated activations to the next's
    uint tiles;        // that there may be
};
static_assert(sizeof(MoeArgs) == 40, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(MoeArgs, experts) == 12, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(MoeArgs, width) == 24, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(MoeArgs, tiles) == 36, "as in src/metal/args.rs");

// Where an expert's weights are: bytes from the start of all codes, and of all scales; and their factors.
struct MoePlace {
    ulong gate_codes;
    ulong gate_scales;
    ulong up_codes;
    ulong up_scales;
    ulong down_codes;
    ulong down_scales;
    float gate_factor;
    float up_factor;
    float down_factor;
    uint unused;
};
static_assert(sizeof(MoePlace) == 64, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(MoePlace, up_codes) == 16, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(MoePlace, down_codes) == 32, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(MoePlace, down_factor) == 56, "as in src/metal/args.rs");

// Slots of one expert that are multiplied together: `count` from `first` on in the list of slots. Kernels write and read it.
struct MoeTile {
    uint expert;
    uint first;
    uint count; // 0 where there is no such tile
};
static_assert(sizeof(MoeTile) == 12, "as in src/metal/args.rs");

// Where a vector of each token lies in a pool: a latent, a rotary key, heads' keys or values. All are bytes, but for the width and
// tokens. The pool is whole blocks; within one, the codes of the token at `offset` begin at
// codes + head · head_bytes + offset · code_stride, and its scales likewise.
struct CachePart {
    uint block_bytes;
    uint block_tokens;
    uint width;        // elements of the vector; 0 where there is no such part
    uint codes;
    uint code_stride;
    uint scales;
    uint scale_stride;
    uint head_bytes;   // from one head's vectors to the next's; 0 where there are no heads
};
static_assert(sizeof(CachePart) == 32, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(CachePart, width) == 8, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(CachePart, code_stride) == 16, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(CachePart, scale_stride) == 24, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(CachePart, head_bytes) == 28, "as in src/metal/args.rs");

// What MLA keeps of a token, in a pool, and its queries. The latent is as wide as the pool's, the rotary key as `rows` says.
struct AppendLatentsArgs {
    CachePart latent;
    CachePart key;
    LatentArgs rows;
};
static_assert(sizeof(AppendLatentsArgs) == 100, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(AppendLatentsArgs, key) == 32, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(AppendLatentsArgs, rows) == 64, "as in src/metal/args.rs");

// Keys and values of heads, in a pool.
struct AppendHeadsArgs {
    CachePart keys;
    CachePart values;
    uint heads;
    uint key_token; // elements from one token to the next
    uint key_head;  // elements from one head to the next
    uint value_token;
    uint value_head;
};
static_assert(sizeof(AppendHeadsArgs) == 84, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(AppendHeadsArgs, values) == 32, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(AppendHeadsArgs, heads) == 64, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(AppendHeadsArgs, value_head) == 80, "as in src/metal/args.rs");

// Attention over a paged cache.
struct PagedArgs {
    CachePart keys;      // MLA: the latent, which is the value too
    CachePart values;    // MLA: the rotary key
    uint tokens;         // that the index tells of
    uint first;          // the first of them that the launch takes
    uint heads;          // of queries
    uint together;       // heads of queries that a threadgroup takes, and with heads those of a kv head
    uint splits;
    uint split_tokens;   // positions of a split
    uint window;         // positions that a query sees
    uint q_token;        // elements from one token's queries to the next's
    uint q_head;
    uint rotary_token;   // the same of rotary parts
    uint rotary_head;
    float score_factor;  // what products become scores in base 2 by
};
static_assert(sizeof(PagedArgs) == 112, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(PagedArgs, values) == 32, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(PagedArgs, tokens) == 64, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(PagedArgs, splits) == 80, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(PagedArgs, q_token) == 92, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(PagedArgs, score_factor) == 108, "as in src/metal/args.rs");

// Parts of attention that are merged.
struct MergeArgs {
    uint splits;
    uint width;
};
static_assert(sizeof(MergeArgs) == 8, "as in src/metal/args.rs");

// Tokens of a sequence, as numbers.
struct GatherArgs {
    CachePart keys;   // MLA: the latent
    CachePart values; // MLA: the rotary key
    uint heads;       // that there are of keys, and of values, if these have a width
    uint table;       // where in the index the sequence's begins
    uint first;       // the first position
    uint positions;
};
static_assert(sizeof(GatherArgs) == 80, "as in src/metal/args.rs");
static_assert(__builtin_offsetof(GatherArgs, heads) == 64, "as in src/metal/args.rs");
