//! Where decisions come from: a seed, or the bytes that a fuzzer hands in.

/// Reproducible numbers. The bytes of a fuzzer's input come first, so that it learns what each of them decides; a seed's
/// numbers follow without end.
pub struct Random<'a> {
    bytes: &'a [u8],
    state: u64,
}

impl<'a> Random<'a> {
    pub fn of_seed(seed: u64) -> Self {
        Self::of_bytes(&[], seed)
    }

    pub fn of_bytes(bytes: &'a [u8], seed: u64) -> Self {
        Self { bytes, state: seed }
    }

    /// SplitMix64.
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `count`, which is not 0.
    pub fn below(&mut self, count: usize) -> usize {
        let number = match self.bytes.split_at_checked(if count <= 256 { 1 } else { 3 }) {
            Some((taken, rest)) => {
                self.bytes = rest;
                taken
                    .iter()
                    .fold(0, |number, byte| number << 8 | u64::from(*byte))
            }
            None => self.next(),
        };
        (number % count as u64) as usize
    }

    /// One time in `count`.
    pub fn once_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }

    pub fn pick<'t, T>(&mut self, of: &'t [T]) -> &'t T {
        &of[self.below(of.len())]
    }

    pub fn byte(&mut self) -> u8 {
        self.below(256) as u8
    }
}
