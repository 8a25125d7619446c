//! Where a safetensors file's header is wrong: the `safetensors` crate says what is, but of most faults not of which tensor.

use ::safetensors::tensor::TensorInfo;
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use std::collections::BTreeSet;
use std::fmt;

/// What stands in a header beside tensors.
const METADATA: &str = "__metadata__";

/// The tensor at fault in a file that cannot be read, and what is wrong with it. `None` where the fault is no tensor's.
pub(super) fn fault(file: &[u8]) -> Option<(String, String)> {
    let (size, rest) = file.split_first_chunk()?;
    let size = usize::try_from(u64::from_le_bytes(*size)).ok()?;
    let (header, data) = rest.split_at_checked(size)?;
    let mut tensors = Tensors::default();
    let mut json = serde_json::Deserializer::from_slice(header);
    if let Err(error) = (&mut tensors).deserialize(&mut json).and_then(|()| json.end()) {
        return Some((tensors.current?, error.to_string()));
    }
    let mut tensors = tensors.read;
    tensors.iter().find_map(alone).or_else(|| {
        tensors.sort_by_key(|(_, info)| info.data_offsets);
        beside_others(&tensors, data.len())
    })
}

/// What is wrong with a tensor whatever the others are.
fn alone((name, info): &(String, TensorInfo)) -> Option<(String, String)> {
    let (begin, end) = info.data_offsets;
    let bits = (info.shape.iter()).try_fold(info.dtype.bitsize(), |product, n| product.checked_mul(*n));
    let bytes = bits.filter(|bits| bits.is_multiple_of(8)).map(|bits| bits / 8);
    if bytes.is_some() && bytes == end.checked_sub(begin) {
        return None;
    }
    let taken = bytes.map_or("no whole number of bytes that memory holds".into(), |bytes| {
        format!("{bytes} bytes")
    });
    let problem = format!(
        "{:?} of shape {:?} takes {taken}, and its data is said to begin at {begin} and to end at {end}",
        info.dtype, info.shape
    );
    Some((name.clone(), problem))
}

/// What is wrong with where tensors lie; they are in the order of their data.
fn beside_others(tensors: &[(String, TensorInfo)], data: usize) -> Option<(String, String)> {
    let (mut free, mut before) = (0, None);
    for (name, info) in tensors {
        let (begin, end) = info.data_offsets;
        if begin != free {
            let behind = before.map_or("the beginning".to_string(), |name| format!("the end of `{name}`"));
            let problem = format!("its data begins at {begin}; expected {free}, {behind}");
            return Some((name.clone(), problem));
        }
        if end > data {
            let problem = format!("its data ends at {end}, behind the end of the file's data at {data}");
            return Some((name.clone(), problem));
        }
        (free, before) = (end, Some(name));
    }
    let last = before.filter(|_| free != data)?;
    let problem = format!("its data is the last and ends at {free}, but the file's data at {data}");
    Some((last.clone(), problem))
}

/// A header's tensors as far as they can be read.
#[derive(Default)]
struct Tensors {
    read: Vec<(String, TensorInfo)>,
    names: BTreeSet<String>,
    /// The one that is being read.
    current: Option<String>,
}

impl<'de> DeserializeSeed<'de> for &mut Tensors {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for &mut Tensors {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with a field for each tensor")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(name) = map.next_key::<String>()? {
            if name == METADATA {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            self.current = Some(name.clone());
            if !self.names.insert(name.clone()) {
                return Err(A::Error::custom("the header has it twice"));
            }
            self.read.push((name, map.next_value()?));
            self.current = None;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(header: &str) -> Option<(String, String)> {
        let size = (header.len() as u64).to_le_bytes();
        fault(&[&size, header.as_bytes(), &[0; 8]].concat())
    }

    #[test]
    fn the_tensor_at_fault_is_found() {
        let two = |first: &str, second: &str| {
            of(&format!(
                r#"{{"__metadata__": 5, "a": {{"dtype": "F32", {first}}}, "b": {{"dtype": "F16", {second}}}}}"#
            ))
        };
        let good = r#""shape": [1], "data_offsets": [0, 4]"#;
        assert_eq!(two(good, r#""shape": [2], "data_offsets": [4, 8]"#), None);
        for (second, part) in [
            (r#""shape": [3], "data_offsets": [4, 8]"#, "takes 6 bytes"),
            (r#""shape": [2], "data_offsets": [8, 4]"#, "begin at 8"),
            (
                r#""shape": [2], "data_offsets": [5, 9]"#,
                "expected 4, the end of `a`",
            ),
            (r#""shape": [1], "data_offsets": [4, 6]"#, "data at 8"),
            (r#""shape": [3], "data_offsets": [4, 10]"#, "ends at 10"),
            (
                r#""shape": [18446744073709551615, 2], "data_offsets": [4, 8]"#,
                "no whole number",
            ),
            (r#""shape": [-1], "data_offsets": [4, 8]"#, "invalid value"),
            (r#""shape": [2]"#, "data_offsets"),
        ] {
            let (name, problem) = two(good, second).unwrap();
            assert!(name == "b" && problem.contains(part), "{name}: {problem}");
        }
        let (name, problem) = of(r#"{"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},
            "a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}"#)
        .unwrap();
        assert!(name == "a" && problem.contains("twice"), "{name}: {problem}");
    }

    #[test]
    fn what_is_no_tensors_fault() {
        for header in ["", "[]", "{", "{}", r#"{"__metadata__": }"#] {
            assert_eq!(of(header), None, "{header}");
        }
        assert_eq!(fault(&[1, 2, 3]), None);
        assert_eq!(fault(&u64::MAX.to_le_bytes()), None);
    }
}
