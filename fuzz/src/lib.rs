//! What the fuzzers have in common. What it means to read a folder, and which folders there are, `tests/hostile` says: the same
//! for both.

#[path = "../../tests/common/mod.rs"]
pub mod common;
#[path = "../../tests/hostile/reading/mod.rs"]
pub mod reading;

use reading::folders::{Folder, GGUF, ROOT, SINGLE};
use reading::read;

/// The data that a header claims, at most: a fuzzer's input is the header alone, so that it spends no time on weights.
const MOST_DATA: usize = 1 << 20;

/// Reads config and weights.
///
/// # Panics
/// Where the error names no file.
pub fn weights(folder: &Folder) {
    judge(read::folder(folder, false), folder);
}

/// Reads all of a folder.
///
/// # Panics
/// Where the error names no file.
pub fn all(folder: &Folder) {
    judge(read::all(&folder.in_memory()), folder);
}

fn judge(result: candle_mmfp4::Result<()>, folder: &Folder) {
    if let Err(error) = result {
        let text = error.to_string();
        let named = text.contains(ROOT) || text.starts_with("config.json:");
        assert!(named, "{}: names no file: {text}", folder.layout);
    }
}

/// A folder whose file is put together from an input: four bytes that say how much data there is, and a header.
pub fn with_header(mut folder: Folder, input: &[u8]) -> Option<Folder> {
    let (len, header) = input.split_first_chunk()?;
    let data = vec![0; u32::from_le_bytes(*len) as usize % MOST_DATA];
    let (name, file) = match &folder.gguf {
        Some(_) => (GGUF, [header, &data].concat()),
        None => (
            SINGLE,
            [&(header.len() as u64).to_le_bytes(), header, &data].concat(),
        ),
    };
    folder.files.insert(name.into(), file);
    Some(folder)
}

/// The input from which [`with_header`] makes a folder's own file.
pub fn header_of(folder: &Folder) -> Vec<u8> {
    let (header, data) = match &folder.gguf {
        Some(gguf) => {
            let aligned = |stored: &common::gguf::Stored| stored.bytes.len().next_multiple_of(gguf.alignment);
            let file = &folder.files[GGUF];
            // Nothing follows the last tensor.
            let last = gguf
                .tensors
                .last()
                .map_or(0, |stored| aligned(stored) - stored.bytes.len());
            file.split_at(file.len() + last - gguf.tensors.iter().map(aligned).sum::<usize>())
        }
        None => {
            let file = &folder.files[SINGLE];
            let size = u64::from_le_bytes(file[..8].try_into().expect("eight bytes")) as usize;
            file[8..].split_at(size)
        }
    };
    [&(data.len() as u32).to_le_bytes(), header].concat()
}
