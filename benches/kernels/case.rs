//! What is measured: contenders that do the same work.

use candle_mmfp4::fp4::{Bytes, Weight};

/// What bounds a case, and what its rates count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// Reading: bytes a second.
    Bytes,
    /// Multiplying bytes: operations a second, a product and its sum being two.
    Operations,
    /// Multiplying floats, BF16 where there are instructions for it: operations a second.
    Floats,
}

impl Bound {
    /// What bounds attention beside this: reading, or multiplying floats.
    pub fn other(self) -> Self {
        match self {
            Self::Bytes => Self::Floats,
            Self::Operations | Self::Floats => Self::Bytes,
        }
    }
}

/// The same work, done by several.
pub struct Case {
    /// For criterion's filter and its folders.
    pub name: String,
    /// For people.
    pub title: String,
    pub bound: Bound,
    /// The contender that others are compared with, if any.
    pub peer: Option<&'static str>,
    pub contenders: Vec<Contender>,
}

/// One of them. Its weights are made when it is first called, so that a filter spares time and memory.
pub struct Contender {
    pub name: &'static str,
    /// Bytes or operations a call, as the case is bound.
    pub work: usize,
    /// Of the [other](Bound::other) kind, where either may bound a call.
    pub other: Option<usize>,
    build: Option<Box<dyn FnOnce() -> Ready>>,
    ready: Option<Ready>,
}

/// A contender with its weights.
pub struct Ready {
    /// Does the work once, with weights that have not been read for a while.
    pub call: Box<dyn FnMut()>,
    /// What the calls read in turn, for the read bandwidth; empty where it is not of this crate.
    pub regions: Vec<Bytes>,
}

impl Contender {
    pub fn new(name: &'static str, work: usize, build: impl FnOnce() -> Ready + 'static) -> Self {
        Self {
            name,
            work,
            other: None,
            build: Some(Box::new(build)),
            ready: None,
        }
    }

    /// With this much work of the other kind.
    pub fn beside(self, other: usize) -> Self {
        Self {
            other: Some(other),
            ..self
        }
    }

    /// Its weights, made if this is the first time.
    pub fn ready(&mut self) -> &mut Ready {
        let build = self.build.take();
        self.ready
            .get_or_insert_with(|| build.expect("what was built stays")())
    }

    /// Its weights, if criterion's filter has let it run.
    pub fn if_ready(&mut self) -> Option<&mut Ready> {
        self.ready.as_mut()
    }
}

/// The bytes that weights consist of.
pub fn regions<'a>(weights: impl IntoIterator<Item = &'a Weight>) -> Vec<Bytes> {
    weights.into_iter().flat_map(Weight::regions).cloned().collect()
}

/// Gives 0 .. `len` in turn, without end.
pub fn in_turn(len: usize) -> impl FnMut() -> usize {
    let mut turns = (0..len).cycle();
    move || turns.next().unwrap_or_default()
}
