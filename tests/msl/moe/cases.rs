//! The grid of a mixture's cases.

use crate::grid::pairwise;
use crate::linear::cases::{DTYPES, KINDS, Lies, activations};
use crate::{noise, values};
use candle_core::{DType, Device, Tensor};
use candle_mmfp4::cpu::{Arithmetic, Expert, reference};
use candle_mmfp4::fp4::{Bytes, Factor, Format, Fp4Tensor, Parts, ScaleKind, ScaleRule, Weight, quantize};
use candle_mmfp4::ops::{FusedMoe, GatedMlp};

const TOKENS: [usize; 11] = [1, 2, 3, 5, 8, 9, 17, 31, 32, 33, 65];
const TOP_K: [usize; 8] = [1, 2, 3, 4, 5, 6, 7, 8];
const EXPERTS: [usize; 3] = [8, 9, 40];
const SHARED: [usize; 3] = [0, 1, 2];
/// Elements, rounded up to groups.
const WIDTHS: [usize; 4] = [16, 48, 96, 144];
const SHARED_WIDTHS: [usize; 3] = [16, 80, 192];
const LENGTHS: [usize; 4] = [16, 48, 160, 288];
const GROUPS: [usize; 4] = [16, 32, 64, 128];
const FACTORS: [Factor; 3] = [Factor::None, Factor::Mul(0.37), Factor::Div(3.0)];
const SHIFTS: [usize; 4] = [0, 4, 8, 12];
const LIES: [Lies; 6] = [
    Lies::Together,
    Lies::Offset,
    Lies::WideRows,
    Lies::OddRows,
    Lies::Batches,
    Lies::Transposed,
];
const GOES: [Goes; 4] = [Goes::Everywhere, Goes::Rarely, Goes::Together, Goes::Twice];

/// Which experts tokens go to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goes {
    /// To all of them in turn.
    Everywhere,
    /// To some of them, so that others have none.
    Rarely,
    /// All tokens to the same ones.
    Together,
    /// All slots to one.
    Twice,
}

/// How the weights of a launch are stored.
#[derive(Debug, Clone, Copy)]
pub struct Stored {
    pub group: usize,
    pub kind: ScaleKind,
    /// Each tensor has one of its own near this.
    pub factor: Factor,
    /// Bytes by which codes are off a multiple of 16.
    pub shift: usize,
}

#[derive(Debug, Clone, Copy)]
pub struct Case {
    pub dtype: DType,
    pub tokens: usize,
    pub top_k: usize,
    pub experts: usize,
    pub shared: usize,
    pub d: usize,
    pub width: usize,
    pub shared_width: usize,
    pub gate_up: Stored,
    pub down: Stored,
    pub lies: Lies,
    pub goes: Goes,
}

pub const PLAIN: Stored = Stored {
    group: 32,
    kind: KINDS[0],
    factor: Factor::None,
    shift: 0,
};

impl Default for Case {
    fn default() -> Self {
        Self {
            dtype: DType::F32,
            tokens: 1,
            top_k: 2,
            experts: 5,
            shared: 1,
            d: 64,
            width: 32,
            shared_width: 32,
            gate_up: PLAIN,
            down: PLAIN,
            lies: Lies::Together,
            goes: Goes::Everywhere,
        }
    }
}

impl Case {
    /// The op, all of its weights in one map.
    pub fn op(&self) -> FusedMoe {
        let mut experts = self.all();
        let shared = experts.split_off(self.experts);
        let op = FusedMoe::new(experts, shared).unwrap();
        assert_eq!(op.copied_bytes(), 0);
        op
    }

    /// The first shared expert as an op of its own.
    pub fn mlp(&self) -> GatedMlp {
        let op = GatedMlp::new(self.all().remove(self.experts)).unwrap();
        assert_eq!(op.copied_bytes(), 0);
        op
    }

    /// Routed experts, then shared ones.
    fn all(&self) -> Vec<Expert> {
        let mut tensors = Vec::new();
        for e in 0..self.experts + self.shared {
            let width = if e < self.experts {
                self.width
            } else {
                self.shared_width
            };
            let parts = [
                (width, self.d, self.gate_up),
                (width, self.d, self.gate_up),
                (self.d, width, self.down),
            ];
            for (part, (n, k, stored)) in parts.into_iter().enumerate() {
                let values = noise(n * k, (e * 3 + part + 1) as u64);
                let Stored { group, kind, .. } = stored;
                let tensor =
                    quantize("w", &values, (n, k), Format { group, kind }, ScaleRule::Maximum).unwrap();
                let scales: Vec<u8> = match kind {
                    // Their factor, which the case replaces, brings them to where the other kinds are: so do smaller exponents.
                    ScaleKind::E4M3 => tensor
                        .scales()
                        .iter()
                        .map(|b| b.saturating_sub(11 << 3))
                        .collect(),
                    _ => tensor.scales().to_vec(),
                };
                tensors.push((tensor, scales, stored));
            }
        }
        // Codes first, as a file has them that is sorted by dtype; nothing else lies where nothing should be read.
        let mut memory: Vec<u8> = Vec::new();
        let mut add = |bytes: &[u8], shift: usize| {
            let start = memory.len().next_multiple_of(16) + shift;
            memory.resize(start, 0xff);
            memory.extend_from_slice(bytes);
            start..start + bytes.len()
        };
        let codes: Vec<_> = tensors
            .iter()
            .map(|(tensor, _, stored)| add(tensor.codes(), stored.shift))
            .collect();
        let scales: Vec<_> = tensors
            .iter()
            .map(|(_, scales, stored)| add(scales, if stored.shift > 0 { stored.kind.size() } else { 0 }))
            .collect();
        let map = Bytes::copy_from(&memory).unwrap();
        let places = codes.into_iter().zip(scales);
        let mut weights =
            tensors
                .iter()
                .zip(places)
                .enumerate()
                .map(|(index, ((tensor, _, stored), (codes, scales)))| {
                    let own = 1.0 + (index % 7) as f32 / 8.0;
                    let parts = Parts {
                        shape: tensor.shape(),
                        group: stored.group,
                        codes: map.slice(codes).unwrap(),
                        scales: map.slice(scales).unwrap(),
                        kind: stored.kind,
                        factor: match stored.factor {
                            Factor::None => Factor::None,
                            Factor::Mul(factor) => Factor::Mul(factor * own),
                            Factor::Div(factor) => Factor::Div(factor * own),
                        },
                    };
                    Weight::from(Fp4Tensor::new("w", parts).unwrap())
                });
        let mut experts = Vec::new();
        while let (Some(gate), Some(up), Some(down)) = (weights.next(), weights.next(), weights.next()) {
            experts.push(Expert { gate, up, down });
        }
        experts
    }

    /// Activations, lying as they are to.
    pub fn x(&self) -> candle_core::Result<Tensor> {
        let (m, d) = (self.tokens, self.d);
        let of = |shape| activations(shape, self.dtype, (m * 31 + d) as u64);
        match self.lies {
            Lies::Together => Ok(of((m, d))),
            Lies::Offset => of((m + 1, d)).narrow(0, 1, m),
            Lies::WideRows => of((m, d + 4)).narrow(1, 0, d),
            Lies::OddRows => of((m, d + 3)).narrow(1, 0, d),
            Lies::Batches => of((2 * (m + 1), d))
                .reshape((2, m + 1, d))?
                .narrow(1, 1, m)?
                .narrow(0, 1, 1)?
                .squeeze(0),
            Lies::Transposed => of((d, m)).t(),
        }
    }

    /// Where tokens go.
    pub fn ids(&self) -> Vec<u32> {
        let id = |token: usize, slot: usize| match self.goes {
            Goes::Everywhere => token * self.top_k + slot,
            Goes::Rarely => (token % 2) * (self.experts - self.top_k) + slot,
            Goes::Together => slot + 1,
            Goes::Twice => self.experts - 1,
        };
        let slots = (0..self.tokens).flat_map(|token| (0..self.top_k).map(move |slot| (token, slot)));
        slots
            .map(|(token, slot)| (id(token, slot) % self.experts) as u32)
            .collect()
    }

    /// Weights of the slots.
    pub fn weights(&self) -> Vec<f32> {
        noise(self.tokens * self.top_k, 77)
            .iter()
            .map(|w| w.abs() + 0.1)
            .collect()
    }

    /// Numbers of the slots as a tensor.
    pub fn of_slots<T: candle_core::WithDType>(&self, values: &[T]) -> Tensor {
        Tensor::from_slice(values, (self.tokens, self.top_k), &Device::Cpu).unwrap()
    }

    /// What the plain reference gives for these ids.
    pub fn expected(&self, op: &FusedMoe, ids: &[u32]) -> Vec<f32> {
        let x = values(&self.x().unwrap().contiguous().unwrap());
        let weights = self.weights();
        reference::fused_moe(
            op.experts(),
            op.shared(),
            &x,
            ids,
            &weights,
            self.top_k,
            Arithmetic::Exact,
        )
    }

    /// What the plain reference gives for the first shared expert alone.
    pub fn expected_of_mlp(&self, op: &GatedMlp) -> Vec<f32> {
        let x = values(&self.x().unwrap().contiguous().unwrap());
        let mlp = std::slice::from_ref(op.weights());
        let weights = vec![1.0; self.tokens];
        reference::fused_moe(
            mlp,
            &[],
            &x,
            &vec![0; self.tokens],
            &weights,
            1,
            Arithmetic::Exact,
        )
    }
}

/// Cases in which every two values of two axes meet.
pub fn grid() -> Vec<Case> {
    let axes = [
        DTYPES.len(),
        TOKENS.len(),
        TOP_K.len(),
        EXPERTS.len(),
        SHARED.len(),
        WIDTHS.len(),
        SHARED_WIDTHS.len(),
        LENGTHS.len(),
        GROUPS.len(),
        KINDS.len(),
        FACTORS.len(),
        SHIFTS.len(),
        GROUPS.len(),
        KINDS.len(),
        FACTORS.len(),
        SHIFTS.len(),
        LIES.len(),
        GOES.len(),
    ];
    let case = |at: [usize; 18]| {
        let stored = |at: &[usize]| Stored {
            group: GROUPS[at[0]],
            kind: KINDS[at[1]],
            factor: FACTORS[at[2]],
            shift: SHIFTS[at[3]],
        };
        let (gate_up, down) = (stored(&at[8..12]), stored(&at[12..16]));
        Case {
            dtype: DTYPES[at[0]],
            tokens: TOKENS[at[1]],
            top_k: TOP_K[at[2]],
            experts: EXPERTS[at[3]],
            shared: SHARED[at[4]],
            width: WIDTHS[at[5]].next_multiple_of(down.group),
            shared_width: SHARED_WIDTHS[at[6]].next_multiple_of(down.group),
            d: LENGTHS[at[7]].next_multiple_of(gate_up.group),
            gate_up,
            down,
            lies: LIES[at[16]],
            goes: GOES[at[17]],
        }
    };
    let mut cases: Vec<_> = pairwise(axes).into_iter().map(case).collect();
    if crate::full() {
        // All dtypes, tokens, formats and ways to go; the rest in turn.
        let first = [0, 1, 8, 9, 17];
        let count: usize = first.iter().map(|axis| axes[*axis]).product();
        cases.extend((0..count).map(|index| {
            let mut rest = index;
            let mut at = axes.map(|size| index % size);
            for axis in first {
                at[axis] = rest % axes[axis];
                rest /= axes[axis];
            }
            case(at)
        }));
    }
    cases
}
