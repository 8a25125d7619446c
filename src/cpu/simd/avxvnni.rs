//! AVX2 with AVX-VNNI: Intel from Alder Lake, AMD from Zen 5.

use super::avx2::{self, Bits256};

pub(super) fn available() -> bool {
    avx2::available() && is_x86_feature_detected!("avxvnni")
}

type AvxVnni = Bits256<true>;

// Of sixteen registers a product of two by six takes twelve for sums, two for weights, one for an activation.
super::table::kernels!(AvxVnni, registers: 2, rows: 6, features: "avx2,fma,avxvnni");
