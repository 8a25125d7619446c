//! Plans of experts: `metal/moe.metal`.

use super::args::{Argument, MOE_TILE, MoeArgs, MoePlace};
use super::checked::{aligned, narrow, suffix};
use super::plan::{Binding, Constant, Launch, Plan, Work};
use super::rows;
use crate::Result;
use crate::cpu::Expert;
use crate::fp4::{Bytes, Factor, Format, Fp4Tensor, ScaleKind, ScaleRule, Weight, gather, quantize};
use candle_core::DType;

const OP: &str = "mmfp4-moe";

/// The most experts, shared ones included, that a kernel sorts slots by.
pub const MOST_EXPERTS: usize = 512;
/// Tokens up to which each slot goes by itself; above, slots are sorted by expert.
const FEW: usize = 8;
/// Slots, and rows of weights, of a tile.
const TILE: usize = 32;

/// Experts as kernels find them: the bytes from the first to the last of them, and a table of where each one's are.
#[derive(Debug, Clone)]
pub struct Stack {
    codes: Bytes,
    scales: Bytes,
    places: Bytes,
    routed: usize,
    shared: usize,
    d: usize,
    /// Of routed experts, and of shared ones; 0 where there are none.
    widths: [usize; 2],
    gate_up: Stored,
    down: Stored,
}

/// How the weights of a launch are stored.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Stored {
    kind: ScaleKind,
    group: usize,
    /// The constant of `metal/fp4.h`.
    factor: u16,
    /// The first codes, and the first scales, that do not begin at a multiple of 4 bytes, or of a scale's size.
    misaligned: Option<(&'static str, usize)>,
    /// Whether all can be [loaded wide](rows::wide).
    wide: bool,
}

impl Stored {
    /// How these are stored; `None` where they are not stored alike.
    fn of<'a>(tensors: impl Iterator<Item = &'a Fp4Tensor>) -> Option<Self> {
        let mut all: Option<Self> = None;
        for tensor in tensors {
            let factor = rows::factor_constant(tensor.factor());
            let (kind, group) = (tensor.scale_kind(), tensor.group());
            let parts = [
                ("codes", tensor.codes().offset(), 4),
                ("scales", tensor.scales().offset(), kind.size()),
            ];
            let off = parts
                .into_iter()
                .find(|(_, offset, to)| !offset.is_multiple_of(*to))
                .map(|(argument, offset, _)| (argument, offset));
            let wide = rows::wide(tensor);
            let all = all.get_or_insert(Self {
                kind,
                group,
                factor,
                misaligned: off,
                wide,
            });
            // Without a factor is with a factor of 1, whichever way the others go.
            if (all.kind, all.group) != (kind, group) || all.factor != factor && all.factor * factor != 0 {
                return None;
            }
            all.factor = all.factor.max(factor);
            all.misaligned = all.misaligned.or(off);
            all.wide &= wide;
        }
        all
    }

    /// The constants of `metal/fp4.h` and `metal/rows.h`, for rows of `k` elements.
    fn constants(&self, k: usize, wide: bool) -> Vec<(u16, Constant)> {
        let stored = rows::Stored {
            kind: self.kind,
            group: self.group,
            factor: self.factor,
        };
        stored.constants(self.wide && wide, k)
    }

    /// Refuses what no kernel can load.
    fn check(&self) -> Result<()> {
        match self.misaligned {
            Some(("codes", offset)) => aligned(OP, "codes", offset, 4),
            Some((argument, offset)) => aligned(OP, argument, offset, self.kind.size()),
            None => Ok(()),
        }
    }
}

impl Stack {
    /// Routed and shared experts; `None` where no kernel takes them: where one is not in FP4 throughout, not all of gate and
    /// up or of down are stored alike, shared ones differ in width, there are more than [`MOST_EXPERTS`], or they are not in
    /// one map.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io) where the system has no memory left.
    pub fn of(routed: &[Expert], shared: &[Expert]) -> Result<Option<Self>> {
        let all = || routed.iter().chain(shared);
        let Some(first) = all().next().filter(|_| all().count() <= MOST_EXPERTS) else {
            return Ok(None);
        };
        let width = |experts: &[Expert]| experts.first().map_or(0, |expert| expert.gate.shape().0);
        let widths = [width(routed), width(shared)];
        if shared.iter().any(|expert| expert.gate.shape().0 != widths[1]) {
            return Ok(None);
        }
        let mut tensors: Vec<[&Fp4Tensor; 3]> = Vec::new();
        for expert in all() {
            let [Weight::Fp4(gate), Weight::Fp4(up), Weight::Fp4(down)] = expert.weights() else {
                return Ok(None);
            };
            tensors.push([gate, up, down]);
        }
        let gate_up = Stored::of(tensors.iter().flat_map(|[gate, up, _]| [*gate, *up]));
        let down = Stored::of(tensors.iter().map(|[.., down]| *down));
        // Aligned as the map is, whatever an expert begins with.
        let codes = Bytes::spanning(tensors.iter().flatten().map(|tensor| tensor.codes()), 16);
        let scales = Bytes::spanning(tensors.iter().flatten().map(|tensor| tensor.scales()), 16);
        let (Some(gate_up), Some(down), Some(codes), Some(scales)) = (gate_up, down, codes, scales) else {
            return Ok(None);
        };
        let place = |of_expert: &[&Fp4Tensor; 3]| MoePlace {
            offsets: of_expert.map(|tensor| {
                [
                    (tensor.codes().offset() - codes.offset()) as u64,
                    (tensor.scales().offset() - scales.offset()) as u64,
                ]
            }),
            factors: of_expert.map(|tensor| match tensor.factor() {
                Factor::None => 1.0,
                Factor::Mul(factor) | Factor::Div(factor) => factor,
            }),
            unused: 0,
        };
        let places: Vec<u8> = tensors
            .iter()
            .flat_map(|tensors| place(tensors).bytes())
            .collect();
        Ok(Some(Self {
            places: Bytes::copy_from(&places)?,
            codes,
            scales,
            routed: routed.len(),
            shared: shared.len(),
            d: first.gate.shape().1,
            widths,
            gate_up,
            down,
        }))
    }

    /// A plan's first operands: codes, scales, places.
    pub fn bytes(&self) -> [&Bytes; 3] {
        [&self.codes, &self.scales, &self.places]
    }

    /// Elements of a token.
    pub fn d(&self) -> usize {
        self.d
    }

    /// The width of every expert, or 0 where there are two.
    fn width(&self) -> usize {
        match self.widths {
            [width, 0] | [0, width] => width,
            [routed, shared] if routed == shared => routed,
            _ => 0,
        }
    }

    /// Elements of h that a slot has room for.
    fn h_row(&self) -> usize {
        self.widths.into_iter().max().unwrap_or(0)
    }
}

/// The slots' ids and weights, `[T, top_k]` each, without gaps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Routed {
    /// Which operand holds ids in U32, and the bytes before the first.
    pub ids: (usize, usize),
    /// Which operand holds weights in F32, and the bytes before the first.
    pub weights: (usize, usize),
    /// Routed experts that a token goes to.
    pub top_k: usize,
}

/// Tokens that go through experts. Codes, scales and places are the operands 0, 1 and 2.
#[derive(Debug, Clone, Copy)]
pub struct Mixture<'a> {
    /// The experts.
    pub stack: &'a Stack,
    /// Where tokens go; `None` without routed experts.
    pub routed: Option<Routed>,
    /// Which operand holds activations.
    pub x: usize,
    /// Which operand is the output, `[T, D]`.
    pub y: usize,
    /// The first of the operands that are [scratch](Self::scratch).
    pub scratch: usize,
    /// F32, F16 or BF16, of activations and output.
    pub dtype: DType,
    /// Rows of activations.
    pub tokens: usize,
    /// Bytes before the first activation in its buffer.
    pub x_offset: usize,
    /// Elements from one row of activations to the next.
    pub x_row: usize,
}

/// Plans that between them launch every kernel on experts of a format: what can be compiled ahead of the first token.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) for a dtype that no kernel has; [`crate::Error::Tensor`] for a format that cannot be.
pub fn every_kernel(format: Format, dtype: DType) -> Result<Vec<Plan>> {
    let size = 2 * format.group;
    let weight = || -> Result<Weight> {
        let zeros = vec![0.0; size * size];
        Ok(quantize("w", &zeros, (size, size), format, ScaleRule::Maximum)?.into())
    };
    let mut expert = Expert {
        gate: weight()?,
        up: weight()?,
        down: weight()?,
    };
    gather(&mut [&mut expert.gate, &mut expert.up, &mut expert.down])?;
    let experts = std::slice::from_ref(&expert);
    let mut plans = Vec::new();
    // A mixture, and a gated MLP.
    for (routed, shared) in [(experts, &[][..]), (&[][..], experts)] {
        let Some(stack) = Stack::of(routed, shared)? else {
            continue;
        };
        for tokens in [1, FEW + 1] {
            let choice = Routed {
                ids: (4, 0),
                weights: (5, 0),
                top_k: 1,
            };
            let mixture = Mixture {
                stack: &stack,
                routed: (!routed.is_empty()).then_some(choice),
                x: 3,
                y: 6,
                scratch: 7,
                dtype,
                tokens,
                x_offset: 0,
                x_row: size,
            };
            plans.push(Plan {
                launches: mixture.launches()?,
            });
        }
    }
    Ok(plans)
}

impl Mixture<'_> {
    /// Sizes in bytes of the memory between its launches.
    pub fn scratch(&self) -> Vec<usize> {
        let slots = self.tokens * self.per_token();
        let h = slots * self.stack.h_row() * size_of::<f32>();
        if self.tokens <= FEW {
            return vec![h];
        }
        let z = slots * self.stack.d * size_of::<f32>();
        vec![h, slots * size_of::<u32>(), self.tiles() * MOE_TILE, z]
    }

    /// Its launches.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) for a dtype that no kernel has, for sizes beyond 32 bits, and for codes or scales that are not
    /// aligned.
    pub fn launches(&self) -> Result<Vec<Launch>> {
        let kind = suffix(OP, self.dtype)?;
        self.stack.gate_up.check()?;
        self.stack.down.check()?;
        narrow(OP, "x", self.tokens * self.per_token())?;
        if let Some(routed) = self.routed {
            for (argument, (_, offset)) in [("ids", routed.ids), ("weights", routed.weights)] {
                aligned(OP, argument, offset, 4)?;
            }
        }
        if self.tokens == 0 {
            return Ok(Vec::new());
        }
        if self.tokens <= FEW {
            return Ok(vec![self.gate_up(kind)?, self.down(kind)?]);
        }
        Ok(vec![
            self.sort()?,
            self.tiles_gate_up(kind)?,
            self.tiles_down()?,
            self.sum(kind)?,
        ])
    }

    fn gate_up(&self, kind: &str) -> Result<Launch> {
        let rows_of_threadgroup = 8;
        Ok(Launch {
            kernel: format!("moe_gate_up_{kind}"),
            constants: self.with_routed(self.stack.gate_up.constants(self.stack.d, self.wide())),
            threadgroups: [
                self.stack.h_row().div_ceil(rows_of_threadgroup),
                self.per_token(),
                self.tokens,
            ],
            threads: [64, 1, 1],
            bindings: self.bindings(vec![
                Some(read(0)),
                Some(read(1)),
                Some(read(2)),
                Some(self.read_x()),
                self.ids(),
                Some(write(self.h())),
                Some(self.args()?),
            ]),
            work: self.work_of_gate_up(),
        })
    }

    fn down(&self, kind: &str) -> Result<Launch> {
        let rows_of_threadgroup = 4;
        Ok(Launch {
            kernel: format!("moe_down_{kind}"),
            constants: self.with_routed(self.stack.down.constants(self.stack.width(), true)),
            threadgroups: [self.stack.d.div_ceil(rows_of_threadgroup), self.tokens, 1],
            threads: [256, 1, 1],
            bindings: self.bindings(vec![
                Some(read(0)),
                Some(read(1)),
                Some(read(2)),
                self.ids(),
                self.weights(),
                Some(read(self.h())),
                Some(write(self.y)),
                Some(self.args()?),
            ]),
            work: Work {
                written: self.of_tokens(self.dtype),
                read: self.work_of_down().read + self.of_slots(2 * size_of::<u32>()),
                ..self.work_of_down()
            },
        })
    }

    fn sort(&self) -> Result<Launch> {
        Ok(Launch {
            kernel: "moe_sort".into(),
            constants: self.with_routed(Vec::new()),
            threadgroups: [1, 1, 1],
            threads: [512, 1, 1],
            bindings: self.bindings(vec![
                self.ids(),
                Some(write(self.sorted())),
                Some(write(self.list())),
                Some(self.args()?),
            ]),
            work: Work {
                read: self.of_slots(size_of::<u32>()),
                written: (self.tokens * self.per_token() * size_of::<u32>() + self.tiles() * MOE_TILE) as u64,
                ..Work::default()
            },
        })
    }

    fn tiles_gate_up(&self, kind: &str) -> Result<Launch> {
        Ok(Launch {
            kernel: format!("moe_tiles_gate_up_{kind}"),
            // Gate and up share a tile.
            threadgroups: [self.stack.h_row().div_ceil(TILE / 2), self.tiles(), 1],
            threads: [128, 1, 1],
            constants: self.stack.gate_up.constants(self.stack.d, self.wide()),
            bindings: self.bindings_of_tiles(self.read_x(), self.h())?,
            work: self.work_of_gate_up(),
        })
    }

    fn tiles_down(&self) -> Result<Launch> {
        Ok(Launch {
            kernel: "moe_tiles_down".into(),
            threadgroups: [self.stack.d.div_ceil(TILE), self.tiles(), 1],
            threads: [128, 1, 1],
            constants: self.stack.down.constants(self.stack.width(), true),
            bindings: self.bindings_of_tiles(read(self.h()), self.z())?,
            work: self.work_of_down(),
        })
    }

    fn sum(&self, kind: &str) -> Result<Launch> {
        let elements_of_threadgroup = 4 * 64;
        Ok(Launch {
            kernel: format!("moe_sum_{kind}"),
            constants: self.with_routed(Vec::new()),
            threadgroups: [self.stack.d.div_ceil(elements_of_threadgroup), self.tokens, 1],
            threads: [64, 1, 1],
            bindings: self.bindings(vec![
                Some(read(self.z())),
                self.ids(),
                self.weights(),
                Some(write(self.y)),
                Some(self.args()?),
            ]),
            work: Work {
                read: self.work_of_down().written + self.of_slots(2 * size_of::<u32>()),
                written: self.of_tokens(self.dtype),
                ..Work::default()
            },
        })
    }

    fn top_k(&self) -> usize {
        self.routed.map_or(0, |routed| routed.top_k)
    }

    /// Slots of a token.
    fn per_token(&self) -> usize {
        self.top_k() + self.stack.shared
    }

    /// The most tiles there can be, however slots fall to experts: each expert in use has one that is not full.
    fn tiles(&self) -> usize {
        let slots = self.tokens * self.top_k();
        let routed = (slots + (TILE - 1) * self.stack.routed.min(slots)) / TILE;
        routed + self.stack.shared * self.tokens.div_ceil(TILE)
    }

    fn h(&self) -> usize {
        self.scratch
    }

    fn sorted(&self) -> usize {
        self.scratch + 1
    }

    fn list(&self) -> usize {
        self.scratch + 2
    }

    fn z(&self) -> usize {
        self.scratch + 3
    }

    fn read_x(&self) -> Binding {
        Binding::Read {
            operand: self.x,
            offset: self.x_offset,
        }
    }

    fn ids(&self) -> Option<Binding> {
        self.routed.map(|routed| Binding::Read {
            operand: routed.ids.0,
            offset: routed.ids.1,
        })
    }

    fn weights(&self) -> Option<Binding> {
        self.routed.map(|routed| Binding::Read {
            operand: routed.weights.0,
            offset: routed.weights.1,
        })
    }

    /// Bindings at their indices, but those that are not there.
    fn bindings(&self, all: Vec<Option<Binding>>) -> Vec<(usize, Binding)> {
        let indexed = all.into_iter().enumerate();
        indexed
            .filter_map(|(index, binding)| Some((index, binding?)))
            .collect()
    }

    fn bindings_of_tiles(&self, from: Binding, to: usize) -> Result<Vec<(usize, Binding)>> {
        Ok(self.bindings(vec![
            Some(read(0)),
            Some(read(1)),
            Some(read(2)),
            Some(read(self.sorted())),
            Some(read(self.list())),
            Some(from),
            Some(write(to)),
            Some(self.args()?),
        ]))
    }

    /// Whether rows of activations begin at multiples of 16 bytes.
    fn wide(&self) -> bool {
        let size = self.dtype.size_in_bytes();
        self.x_offset.is_multiple_of(16) && (self.x_row * size).is_multiple_of(16)
    }

    fn with_routed(&self, mut constants: Vec<(u16, Constant)>) -> Vec<(u16, Constant)> {
        constants.push((8, Constant::Bool(self.routed.is_some())));
        constants
    }

    fn args(&self) -> Result<Binding> {
        let Stack {
            routed,
            shared,
            d,
            widths,
            ..
        } = *self.stack;
        let args = MoeArgs {
            tokens: narrow(OP, "x", self.tokens)?,
            d: narrow(OP, "experts", d)?,
            x_row: narrow(OP, "x", self.x_row)?,
            experts: narrow(OP, "experts", routed)?,
            shared: narrow(OP, "shared", shared)?,
            top_k: narrow(OP, "ids", self.top_k())?,
            width: narrow(OP, "experts", widths[0])?,
            shared_width: narrow(OP, "shared", widths[1])?,
            h_row: narrow(OP, "experts", self.stack.h_row())?,
            tiles: narrow(OP, "x", self.tiles())?,
        };
        Ok(Binding::Bytes(args.bytes()))
    }

    /// Bytes of tokens in a dtype.
    fn of_tokens(&self, dtype: DType) -> u64 {
        (self.tokens * self.stack.d * dtype.size_in_bytes()) as u64
    }

    /// Bytes of what routed slots have `size` each of.
    fn of_slots(&self, size: usize) -> u64 {
        (self.tokens * self.top_k() * size) as u64
    }

    /// Elements of the slots' gated activations.
    fn gated(&self) -> usize {
        self.tokens * (self.top_k() * self.stack.widths[0] + self.stack.shared * self.stack.widths[1])
    }

    /// Bytes of `matrices` `[width, d]` of each expert that slots can go to, so stored, and of their places.
    fn of_weights(&self, matrices: usize, stored: Stored) -> u64 {
        let chosen = (self.tokens * self.top_k()).min(self.stack.routed);
        let rows = chosen * self.stack.widths[0] + self.stack.shared * self.stack.widths[1];
        let elements = matrices * rows * self.stack.d;
        let places = (chosen + self.stack.shared) * size_of::<MoePlace>();
        (elements / 2 + elements / stored.group * stored.kind.size() + places) as u64
    }

    fn work_of_gate_up(&self) -> Work {
        Work {
            weights: self.of_weights(2, self.stack.gate_up),
            read: self.of_tokens(self.dtype) + self.of_slots(size_of::<u32>()),
            written: (self.gated() * size_of::<f32>()) as u64,
            operations: (2 * 2 * self.gated() * self.stack.d) as u64,
        }
    }

    /// Of down by tiles: an output a slot.
    fn work_of_down(&self) -> Work {
        Work {
            weights: self.of_weights(1, self.stack.down),
            read: (self.gated() * size_of::<f32>()) as u64,
            written: self.per_token() as u64 * self.of_tokens(DType::F32),
            operations: (2 * self.gated() * self.stack.d) as u64,
        }
    }
}

fn read(operand: usize) -> Binding {
    Binding::Read { operand, offset: 0 }
}

fn write(operand: usize) -> Binding {
    Binding::Write { operand, offset: 0 }
}
