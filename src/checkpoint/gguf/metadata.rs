//! What a GGUF file says of itself: keys and values.

use super::cursor::Cursor;
use std::collections::BTreeMap;
use std::ops::Range;

/// A value. Arrays, which are tokenizers' vocabularies for the most part, are passed over: they are read when they are needed.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Integer(i128),
    /// A 32-bit float's shortest decimal, so that 1e-5 is what a JSON file would say.
    Float(f64),
    Bool(bool),
    Text(String),
    Array(Array),
}

/// An array's elements: what kind they are of, how many there are, and where they lie in the file.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Array {
    kind: u32,
    count: usize,
    range: Range<usize>,
}

impl Value {
    fn of_kind(kind: u32, cursor: &mut Cursor<'_>) -> Option<Self> {
        Some(match kind {
            0 => Self::Integer(u8::from_le_bytes(cursor.array()?).into()),
            1 => Self::Integer(i8::from_le_bytes(cursor.array()?).into()),
            2 => Self::Integer(u16::from_le_bytes(cursor.array()?).into()),
            3 => Self::Integer(i16::from_le_bytes(cursor.array()?).into()),
            4 => Self::Integer(cursor.u32()?.into()),
            5 => Self::Integer(i32::from_le_bytes(cursor.array()?).into()),
            6 => Self::Float(f32::from_le_bytes(cursor.array()?).to_string().parse().ok()?),
            7 => match cursor.array()? {
                [0] => Self::Bool(false),
                [1] => Self::Bool(true),
                _ => return None,
            },
            8 => Self::Text(String::from_utf8(cursor.text()?.to_vec()).ok()?),
            9 => Self::Array(Array::pass(cursor)?),
            10 => Self::Integer(cursor.u64()?.into()),
            11 => Self::Integer(i64::from_le_bytes(cursor.array()?).into()),
            12 => Self::Float(f64::from_le_bytes(cursor.array()?)),
            _ => return None,
        })
    }
}

impl Array {
    fn pass(cursor: &mut Cursor<'_>) -> Option<Self> {
        let (kind, count) = (cursor.u32()?, cursor.size()?);
        let start = cursor.at();
        let size = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            // Each text takes eight bytes at least: the file's end comes soon where the count is wrong.
            8 => 0,
            // Arrays of arrays, which llama.cpp refuses too.
            _ => return None,
        };
        match size {
            0 => (0..count).try_for_each(|_| cursor.text().map(|_| ()))?,
            _ => cursor.skip(count.checked_mul(size)?).map(|_| ())?,
        }
        let range = start..cursor.at();
        Some(Self { kind, count, range })
    }

    /// A cursor over the elements in `file`, which the array was read from.
    fn elements<'a>(&self, file: &'a [u8]) -> Cursor<'a> {
        Cursor::new(file.get(self.range.clone()).unwrap_or_default())
    }
}

/// A file's keys and values.
#[derive(Debug, Clone, Default)]
pub(super) struct Metadata(BTreeMap<String, Value>);

impl Metadata {
    /// Reads so many of them; the error says which cannot be read.
    pub fn read(count: usize, cursor: &mut Cursor<'_>) -> Result<Self, String> {
        let mut values = BTreeMap::new();
        for index in 0..count {
            let key = cursor.text().map(|key| String::from_utf8(key.to_vec()));
            let Some(Ok(key)) = key else {
                return Err(format!(
                    "the key of metadata value {index} of {count} cannot be read"
                ));
            };
            let value = cursor.u32().and_then(|kind| Value::of_kind(kind, cursor));
            let Some(value) = value else {
                return Err(format!("the metadata value of {key:?} cannot be read"));
            };
            if values.contains_key(&key) {
                return Err(format!("the metadata has {key:?} twice"));
            }
            values.insert(key, value);
        }
        Ok(Self(values))
    }

    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key)
    }

    pub fn text(&self, key: &str) -> Option<&str> {
        match self.get(key)? {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The texts of an array in the `file` that this was read from.
    pub fn texts<'a>(&self, key: &str, file: &'a [u8]) -> Option<Vec<&'a str>> {
        match self.get(key)? {
            Value::Array(array) if array.kind == 8 => {
                let mut cursor = array.elements(file);
                let texts = (0..array.count).map(|_| std::str::from_utf8(cursor.text()?).ok());
                texts.collect()
            }
            _ => None,
        }
    }

    /// The integers of an array in the `file` that this was read from.
    pub fn integers(&self, key: &str, file: &[u8]) -> Option<Vec<i128>> {
        match self.get(key)? {
            Value::Array(array) if !matches!(array.kind, 8 | 9) => {
                let mut cursor = array.elements(file);
                let values = (0..array.count).map(|_| match Value::of_kind(array.kind, &mut cursor)? {
                    Value::Integer(value) => Some(value),
                    _ => None,
                });
                values.collect()
            }
            _ => None,
        }
    }

    pub fn integer(&self, key: &str) -> Option<i128> {
        match self.get(key)? {
            Value::Integer(value) => Some(*value),
            _ => None,
        }
    }
}
