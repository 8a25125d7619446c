//! What is kept of a conversation.

use crate::Result;
use crate::kv::SequenceId;
use crate::models::glm4_moe_lite::Cache;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The cache of a pipeline and of all its sessions.
pub(super) type SharedCache = Arc<Mutex<Cache>>;

/// Waits for the pass that uses the cache. One that panicked is forgotten when the next begins.
pub(super) fn lock(cache: &SharedCache) -> MutexGuard<'_, Cache> {
    cache.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A sequence of its pipeline's cache: what a chat keeps from turn to turn. What it holds is given up with it.
#[derive(Debug)]
pub struct Session {
    cache: SharedCache,
    id: SequenceId,
    tokens: Vec<u32>,
}

impl Session {
    pub(super) fn new(cache: &SharedCache) -> Self {
        Self {
            id: lock(cache).start(&[]).0,
            cache: Arc::clone(cache),
            tokens: Vec::new(),
        }
    }

    /// The tokens cached.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Forgets all tokens.
    pub fn reset(&mut self) {
        // The sequence is there for as long as the session.
        _ = lock(&self.cache).truncate(self.id, 0);
        self.tokens.clear();
    }

    /// Bytes of the cache that it holds, also those that it shares with others.
    pub fn size_in_bytes(&self) -> usize {
        lock(&self.cache).bytes_of(self.id).unwrap_or(0)
    }

    pub(super) fn id(&self) -> SequenceId {
        self.id
    }

    pub(super) fn is_of(&self, cache: &SharedCache) -> bool {
        Arc::ptr_eq(&self.cache, cache)
    }

    /// Keeps what `prompt` begins with, or takes what the cache has of it where that is more; its last token is computed
    /// anew, for its logits are needed. Gives the number of tokens kept.
    pub(super) fn take_up(&mut self, prompt: &[u32]) -> Result<usize> {
        let mut cache = lock(&self.cache);
        let mut kept = common(&self.tokens, prompt).min(prompt.len() - 1);
        if cache.cached(prompt) > kept {
            let (id, cached) = cache.start(prompt);
            let before = std::mem::replace(&mut self.id, id);
            self.tokens = prompt[..cached].to_vec();
            kept = cached;
            cache.free(before)?;
        } else {
            cache.truncate(self.id, kept)?;
            cache.announce(self.id, prompt.len())?;
            self.tokens.truncate(kept);
        }
        Ok(kept)
    }

    /// Adds tokens that a pass has computed.
    pub(super) fn extend(&mut self, tokens: &[u32]) {
        self.tokens.extend_from_slice(tokens);
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // As in `reset`.
        _ = lock(&self.cache).free(self.id);
    }
}

/// How many tokens two sequences begin with alike.
pub(super) fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// The session of a sequence under way, its own or lent by the caller.
pub(super) enum Held<'a> {
    Own(Session),
    Lent(&'a mut Session),
}

impl Held<'_> {
    pub fn id(&self) -> SequenceId {
        match self {
            Self::Own(session) => session.id(),
            Self::Lent(session) => session.id(),
        }
    }

    pub fn get(&mut self) -> &mut Session {
        match self {
            Self::Own(session) => session,
            Self::Lent(session) => session,
        }
    }
}
