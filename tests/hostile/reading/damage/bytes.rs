//! Damage to bytes, whatever they mean.

use super::Damage;
use crate::reading::random::Random;
use crate::reading::values::{NUMBERS, SIZES};
use std::ops::Range;

/// Changes, removes or inserts bytes within `range`, which may reach beyond the end.
pub fn anywhere(bytes: &mut Vec<u8>, range: Range<usize>, random: &mut Random<'_>) -> Damage {
    let end = range.end.min(bytes.len());
    let len = end.saturating_sub(range.start);
    if len == 0 {
        bytes.push(random.byte());
        return Damage::new("a byte more", []);
    }
    let at = range.start + random.below(len);
    let what = match random.below(9) {
        0 => {
            bytes[at] ^= 1 << random.below(8);
            "a bit turned"
        }
        1 => {
            for place in bytes[at..].iter_mut().take(1 + random.below(8)) {
                *place = random.byte();
            }
            "other bytes"
        }
        2 => {
            bytes[at] = *random.pick(&[0, 1, 0x7f, 0x80, 0xff, b'"', b'{', b'[', b'-', b'9', b'%']);
            "another byte"
        }
        3 => {
            bytes.truncate(at);
            "an early end"
        }
        4 => {
            let until = (at + 1 + random.below(16)).min(bytes.len());
            bytes.drain(at..until);
            "bytes left out"
        }
        5 => {
            let until = (at + 1 + random.below(64)).min(bytes.len());
            let again = bytes[at..until].to_vec();
            bytes.splice(at..at, again);
            "bytes twice"
        }
        6 => {
            let text = match random.below(4) {
                0 => "[".repeat(1 + random.below(4000)),
                1 => "{\"a\":".repeat(1 + random.below(2000)),
                2 => {
                    ["NaN", "1e999", "-", "\\ud800", "\u{feff}", "null", "\"\":"][random.below(7)].to_string()
                }
                _ => random.pick(&NUMBERS).to_string(),
            };
            bytes.splice(at..at, text.into_bytes());
            "a text between"
        }
        7 => {
            // A digit for a digit leaves a text well-formed.
            match bytes[at..].iter().position(u8::is_ascii_digit) {
                Some(digit) => bytes[at + digit] = b'0' + random.below(10) as u8,
                None => bytes[at] ^= 0xff,
            }
            "another digit"
        }
        _ => {
            let number = random.pick(&SIZES).to_le_bytes();
            let size = *random.pick(&[4, 8]);
            for (place, byte) in bytes[at..].iter_mut().zip(&number[..size]) {
                *place = *byte;
            }
            "another number"
        }
    };
    Damage::new(format!("{what} at {at}"), [])
}
