//! Files made to take as much memory as they can for each of their bytes.

use crate::reading::folders::{self, Folder, GGUF, SINGLE};
use crate::reading::read;
use crate::run::alone;
use crate::watch::{Quiet, watch};
use std::fmt::Write;

/// Bytes of such a file.
const SIZE: usize = 2 << 20;
/// Bytes of memory for each byte of a file whose JSON is all small values: a value takes 72 bytes, and a list of them three
/// times as many while it grows.
const MULTIPLE: usize = 128;
/// Of them in one piece: a list of values of two bytes each.
const PIECE: usize = 72 / 2;

fn assert_refused_within(folder: &Folder, what: &str, file: &str) {
    let files = folder.in_memory();
    let quiet = Quiet::new();
    let (result, seen) = watch(|| read::all(&files));
    drop(quiet);
    let most = MULTIPLE * folder.size();
    println!(
        "{what}: {} bytes of memory, {} at once, for {}, {:?}",
        seen.peak,
        seen.largest,
        folder.size(),
        seen.time
    );
    assert!(
        seen.peak < most,
        "{what}: {} bytes of memory for {}",
        seen.peak,
        folder.size()
    );
    assert!(
        seen.largest <= PIECE * folder.size(),
        "{what}: {} bytes at once for {}",
        seen.largest,
        folder.size()
    );
    assert!(seen.time.as_secs() < 120, "{what}: {:?}", seen.time);
    if let Err(error) = result.unwrap() {
        let error = error.to_string();
        // A file that the index names, and that is not there, is named itself.
        let named = error.contains(file) || error.contains("the index names");
        let named = named && error.len() < 2000;
        assert!(named, "{what}: {error:.300}");
    }
}

/// So many times a text, with a number in each.
fn repeated(begin: &str, end: &str, part: impl Fn(usize) -> String) -> Vec<u8> {
    let mut text = begin.to_string();
    let mut number = 0;
    while text.len() < SIZE {
        let comma = if number > 0 { "," } else { "" };
        _ = write!(text, "{comma}{}", part(number));
        number += 1;
    }
    (text + end).into_bytes()
}

#[test]
fn json_of_small_values() {
    let _alone = alone();
    let whole = folders::find("two-files");
    let names = [
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        folders::INDEX,
    ];
    for name in names {
        let texts = [
            repeated("[", "]", |_| "0".into()),
            repeated("{\"a\": [", "]}", |_| "[]".into()),
            repeated("{", "}", |number| format!("\"{number:x}\":0")),
            repeated("{\"weight_map\": {", "}}", |number| {
                format!("\"{number:x}\":\"a.safetensors\"")
            }),
            repeated("{\"chat_template\": [", "]}", |_| "{}".into()),
            b"[".repeat(SIZE),
            b"{\"a\":".repeat(SIZE / 5),
        ];
        for (number, text) in texts.into_iter().enumerate() {
            let mut folder = whole.clone();
            folder.files.insert(name.into(), text);
            assert_refused_within(&folder, &format!("{name} {number}"), name);
        }
    }
}

#[test]
fn headers_of_small_values() {
    let _alone = alone();
    let whole = folders::find("marlin");
    let texts = [
        repeated(
            "{\"a\": {\"dtype\": \"U8\", \"data_offsets\": [0, 0], \"shape\": [",
            "]}}",
            |_| "0".into(),
        ),
        repeated("{", "}", |number| {
            format!("\"{number:x}\":{{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}")
        }),
        repeated("{\"__metadata__\": {", "}}", |number| {
            format!("\"{number:x}\":\"\"")
        }),
        b"[".repeat(SIZE),
    ];
    for (number, header) in texts.into_iter().enumerate() {
        let mut folder = whole.clone();
        let bytes = [&(header.len() as u64).to_le_bytes()[..], &header].concat();
        folder.files.insert(SINGLE.into(), bytes);
        // What nothing asked for is no error: the first tensor that is missing is.
        assert_refused_within(&folder, &format!("header {number}"), "hostile");
    }
}

#[test]
fn gguf_files_of_small_values() {
    let _alone = alone();
    let whole = folders::find("gguf-mxfp4");
    let gguf = || whole.gguf.clone().unwrap();
    let size = |len: usize| (len as u64).to_le_bytes();
    let mut many_keys = gguf();
    many_keys
        .metadata
        .extend((0..SIZE / 16).map(|number| (format!("{number:x}"), (7, vec![1]))));
    let mut many_tensors = gguf();
    for number in 0..SIZE / 40 {
        let mut tensor = many_tensors.tensors[0].clone();
        (tensor.name, tensor.shape, tensor.bytes) = (format!("{number:x}"), vec![1], vec![0; 4]);
        many_tensors.tensors.push(tensor);
    }
    let arrays = |tokens: usize, kinds: &[u8], merges: usize| {
        let mut file = gguf();
        let empty = |count: usize| [&8u32.to_le_bytes()[..], &size(count), &vec![0; 8 * count]].concat();
        file.set("tokenizer.ggml.tokens", (9, empty(tokens)));
        let kinds = [&0u32.to_le_bytes()[..], &size(kinds.len()), kinds].concat();
        file.set("tokenizer.ggml.token_type", (9, kinds));
        file.set("tokenizer.ggml.merges", (9, empty(merges)));
        file
    };
    let files = [
        ("keys", many_keys),
        ("tensors", many_tensors),
        ("added tokens", arrays(SIZE / 9, &[3].repeat(SIZE / 9), 0)),
        ("tokens", arrays(SIZE / 9, &[1].repeat(SIZE / 9), 0)),
        ("types", arrays(0, &[1].repeat(SIZE), 0)),
        ("merges", arrays(0, &[], SIZE / 8)),
    ];
    for (what, file) in files {
        let mut folder = whole.clone();
        folder.files.insert(GGUF.into(), file.bytes());
        assert_refused_within(&folder, what, "hostile");
    }
}
