//! Texts as a model reads them to be quantised.

use super::Tokenizer;
use crate::{Error, Result};

/// The windows of `documents` that a [`Calibration`](crate::models::glm4_moe_lite::Calibration) reads: each document as plain
/// text without special tokens, cut every `size` tokens, its last window shorter. Where that is more than `most` tokens in
/// all, windows are left out evenly, so that all of the text has its share.
///
/// # Errors
/// [`Error::Argument`] where `size` or `most` is 0; those of [`Tokenizer::encode_plain`].
pub fn calibration_windows(
    tokenizer: &Tokenizer,
    documents: &[impl AsRef<str>],
    size: usize,
    most: usize,
) -> Result<Vec<Vec<u32>>> {
    for (argument, value) in [("window", size), ("tokens", most)] {
        if value == 0 {
            return Err(Error::argument("calibration", argument, "1 token or more", "0"));
        }
    }
    let mut windows = Vec::new();
    for document in documents {
        let tokens = tokenizer.encode_plain(document.as_ref())?;
        windows.extend(tokens.chunks(size).map(<[u32]>::to_vec));
    }
    Ok(thinned(windows, most))
}

/// Takes a window whenever so much of the text has passed that its share of `most` has room for it.
fn thinned(windows: Vec<Vec<u32>>, most: usize) -> Vec<Vec<u32>> {
    let total: usize = windows.iter().map(Vec::len).sum();
    if total <= most {
        return windows;
    }
    let (mut seen, mut taken) = (0, 0);
    let chosen = windows.into_iter().filter(|window| {
        seen += window.len();
        // In u128: a product of two lengths.
        let due = (seen as u128 * most as u128 / total as u128) as usize;
        let takes = taken + window.len() <= due;
        taken += if takes { window.len() } else { 0 };
        takes
    });
    chosen.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokenizer() -> Tokenizer {
        Tokenizer::from_file(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/examples/demo-model/tokenizer.json"
        ))
        .unwrap()
    }

    #[test]
    fn documents_are_cut_each_on_its_own() {
        let tokenizer = tokenizer();
        let documents = ["a vector of strings, and a slice of it", "Option", ""];
        let windows = calibration_windows(&tokenizer, &documents, 4, 1000).unwrap();
        let whole = tokenizer.encode_plain(documents[0]).unwrap();
        let count = whole.len().div_ceil(4);
        assert!(count > 2);
        assert_eq!(windows[..count].concat(), whole);
        assert_eq!(
            windows[count..].concat(),
            tokenizer.encode_plain("Option").unwrap()
        );
        for (size, most) in [(0, 4), (4, 0)] {
            assert!(calibration_windows(&tokenizer, &documents, size, most).is_err());
        }
    }

    #[test]
    fn windows_are_left_out_evenly() {
        let windows: Vec<Vec<u32>> = (0..100).map(|index| vec![index; 10]).collect();
        assert_eq!(thinned(windows.clone(), 1000), windows);
        let few = thinned(windows.clone(), 100);
        assert_eq!(few.len(), 10);
        for (index, window) in few.iter().enumerate() {
            assert_eq!(window[0] as usize / 10, index, "{few:?}");
        }
        // A last window of a document may be shorter; no more than asked for is taken all the same.
        let mixed: Vec<Vec<u32>> = (0..100)
            .map(|index| vec![index; 1 + index as usize % 7])
            .collect();
        let taken: usize = thinned(mixed, 123).iter().map(Vec::len).sum();
        assert!((100..=123).contains(&taken), "{taken}");
    }
}
