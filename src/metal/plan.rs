//! Launch plans: what a device is to run, as data.
//!
//! An op turns shapes into a [`Plan`]; an executor encodes it. On a Mac that is Candle's Metal backend; on Linux the
//! same plans run against the same `.metal` sources (feature `msl-host`), so that grids, buffer indices and arguments are
//! executed by tests, not only read.

/// What a kernel is specialised by when its pipeline is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Constant {
    /// An MSL `bool`.
    Bool(bool),
    /// An MSL `ushort`.
    U16(u16),
}

/// What stands at a kernel's buffer index.
#[derive(Debug, Clone, PartialEq)]
pub enum Binding {
    /// A buffer that the kernel only reads: an operand, from this byte on.
    Read {
        /// Index into the operands.
        operand: usize,
        /// Bytes.
        offset: usize,
    },
    /// A buffer that the kernel writes: an operand, from this byte on.
    Write {
        /// Index into the operands.
        operand: usize,
        /// Bytes.
        offset: usize,
    },
    /// A few bytes of the launch's own: an argument struct. At most 4 KiB.
    Bytes(Vec<u8>),
}

/// What a launch cannot do without, whatever the kernel: its floor.
///
/// Bytes count once however often a kernel reads them. What depends on values, such as which experts were chosen, counts
/// as much as it can come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Work {
    /// Bytes of weights: codes, scales, norms, biases, tables.
    pub weights: u64,
    /// Bytes of activations (and of a cache) that are read.
    pub read: u64,
    /// Bytes that are written.
    pub written: u64,
    /// Multiplications and additions of the products.
    pub operations: u64,
}

/// One dispatch of a kernel.
#[derive(Debug, Clone, PartialEq)]
pub struct Launch {
    /// The kernel's `host_name`.
    pub kernel: String,
    /// Function constants by index.
    pub constants: Vec<(u16, Constant)>,
    /// Threadgroups in the grid.
    pub threadgroups: [usize; 3],
    /// Threads in a threadgroup.
    pub threads: [usize; 3],
    /// What stands at each buffer index.
    pub bindings: Vec<(usize, Binding)>,
    /// What it moves and computes.
    pub work: Work,
}

/// Launches in order; each sees what those before it wrote.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Plan {
    /// The launches.
    pub launches: Vec<Launch>,
}

/// What a device has to keep to, whoever it is by: plans stay below.
pub mod limits {
    /// Threads in a threadgroup.
    pub const THREADS: usize = 1024;
    /// Bytes of threadgroup memory.
    pub const THREADGROUP_MEMORY: usize = 32 << 10;
    /// Bytes of a [`Binding::Bytes`](super::Binding::Bytes).
    pub const BYTES: usize = 4 << 10;
}
