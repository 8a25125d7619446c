//! What is measured, a process each.

use candle_mmfp4::kv::{CacheKind, TOKENS_PER_BLOCK};
use std::fmt;

/// What one process measures.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Test {
    pub kind: Kind,
    /// Of a repetition.
    pub tokens: usize,
    /// Tokens that the cache holds before them, a row each, from few to many.
    pub depths: Vec<usize>,
    pub cache: CacheKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Latency,
    Prompt,
    Decode,
}

/// All tests; prompts and generations of 0 tokens are none.
pub fn plan(caches: &[CacheKind], prompts: &[usize], generations: &[usize], depths: &[usize]) -> Vec<Test> {
    let mut depths = depths.to_vec();
    depths.sort_unstable();
    depths.dedup();
    let mut tests = Vec::new();
    for &cache in caches {
        let mut add = |kind, tokens: usize, depths: &[usize]| {
            let depths = depths.to_vec();
            tests.push(Test {
                kind,
                tokens,
                depths,
                cache,
            });
        };
        // A token at the start and one after it.
        add(Kind::Latency, 2, &[0]);
        let some = |tokens: &&usize| **tokens > 0;
        for depth in &depths {
            for tokens in prompts.iter().filter(some) {
                add(Kind::Prompt, *tokens, std::slice::from_ref(depth));
            }
        }
        for tokens in generations.iter().filter(some) {
            add(Kind::Decode, *tokens, &depths);
        }
    }
    tests
}

impl Test {
    /// Tokens of the longest sequence.
    pub fn longest(&self) -> usize {
        let deepest = self.depths.last().copied().unwrap_or(0);
        deepest.saturating_add(self.tokens)
    }

    /// Tokens that the cache is to have room for, of a sequence behind each depth. In blocks they share what they begin
    /// with, up to a block and the last token, and go on in blocks of their own.
    pub fn room(&self) -> usize {
        let sum = |tokens: &dyn Fn(usize) -> usize| {
            let each = self.depths.iter().map(|depth| tokens(*depth));
            each.fold(0, usize::saturating_add)
        };
        match self.cache {
            CacheKind::Contiguous => sum(&|depth| depth.saturating_add(self.tokens)),
            CacheKind::Paged(_) => {
                let own = self.tokens.saturating_add(3 * TOKENS_PER_BLOCK);
                self.longest().saturating_add(sum(&|_| own))
            }
        }
    }
}

impl fmt::Display for Test {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            Kind::Latency => f.write_str("latency")?,
            Kind::Prompt => write!(f, "pp {}", self.tokens)?,
            Kind::Decode => write!(f, "tg {}", self.tokens)?,
        }
        if self.longest() > self.tokens {
            let depths: Vec<_> = self.depths.iter().map(usize::to_string).collect();
            write!(f, " at depth {}", depths.join(", "))?;
        }
        write!(f, ", cache {}", self.cache)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_mmfp4::kv::CacheFormat;

    #[test]
    fn depths_of_a_cache_share_a_process() {
        let caches = [CacheFormat::BF16.into(), CacheKind::Contiguous];
        let tests = plan(&caches, &[8, 0], &[4], &[50, 0, 50]);
        let names: Vec<_> = tests.iter().map(Test::to_string).collect();
        let expected = [
            "latency, cache bf16",
            "pp 8, cache bf16",
            "pp 8 at depth 50, cache bf16",
            "tg 4 at depth 0, 50, cache bf16",
            "latency, cache contiguous",
            "pp 8, cache contiguous",
            "pp 8 at depth 50, cache contiguous",
            "tg 4 at depth 0, 50, cache contiguous",
        ];
        assert_eq!(names, expected);
        assert_eq!((tests[3].longest(), tests[3].room()), (54, 54 + 2 * (4 + 48)));
        assert_eq!((tests[7].longest(), tests[7].room()), (54, 4 + 54));
    }
}
