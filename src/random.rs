//! Random numbers of sampling and of synthetic weights: the same on every machine and in every release.

/// xoshiro256++ 1.0 (Blackman and Vigna, <https://prng.di.unimi.it>), seeded through splitmix64 as its
/// authors advise. Not for secrets.
#[derive(Debug, Clone)]
pub(crate) struct Random {
    state: [u64; 4],
}

impl Random {
    pub(crate) fn new(mut seed: u64) -> Self {
        Self {
            state: std::array::from_fn(|_| splitmix64(&mut seed)),
        }
    }

    fn next(&mut self) -> u64 {
        let s = &mut self.state;
        let result = s[0].wrapping_add(s[3]).rotate_left(23).wrapping_add(s[0]);
        let shifted = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= shifted;
        s[3] = s[3].rotate_left(45);
        result
    }

    /// Uniform in [0, 1): the upper 53 bits.
    pub(crate) fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform bytes: eight a number, the lowest first.
    pub(crate) fn fill(&mut self, bytes: &mut [u8]) {
        let mut words = bytes.chunks_exact_mut(8);
        for word in words.by_ref() {
            word.copy_from_slice(&self.next().to_le_bytes());
        }
        let rest = words.into_remainder();
        let last = self.next().to_le_bytes();
        rest.copy_from_slice(&last[..rest.len()]);
    }

    /// Uniform below a bound that is small beside 2^64.
    #[cfg(test)]
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}

fn splitmix64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first numbers of the authors' C programs.
    #[test]
    fn known_answers() {
        let mut random = Random { state: [1, 2, 3, 4] };
        let numbers: [u64; 6] = std::array::from_fn(|_| random.next());
        assert_eq!(
            numbers,
            [
                41943041,
                58720359,
                3588806011781223,
                3591011842654386,
                9228616714210784205,
                9973669472204895162
            ]
        );
        let mut bytes = [0; 19];
        Random { state: [1, 2, 3, 4] }.fill(&mut bytes);
        let words: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        assert_eq!(bytes, words[..19]);
        assert_eq!(splitmix64(&mut 0), 0xE220_A839_7B1D_CDAF);
        assert_eq!(splitmix64(&mut 1477776061723855037), 1985237415132408290);
    }

    #[test]
    fn uniform_numbers_fill_the_interval() {
        let mut random = Random::new(7);
        let mean = (0..100_000)
            .map(|_| random.uniform())
            .inspect(|u| assert!((0.0..1.0).contains(u)))
            .sum::<f64>()
            / 1e5;
        assert!((mean - 0.5).abs() < 0.005, "{mean}");
    }
}
