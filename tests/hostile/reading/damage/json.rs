//! Damage to JSON that stays JSON.

use super::Damage;
use crate::reading::random::Random;
use crate::reading::values;
use serde_json::Value;

/// Changes a value anywhere below `root`, an object; names the field of `root` that it is in.
pub fn anywhere(root: &mut Value, random: &mut Random<'_>) -> Damage {
    let Value::Object(fields) = &mut *root else {
        *root = values::value(random);
        return Damage::new("another root", []);
    };
    if fields.is_empty() || random.once_in(40) {
        *root = values::value(random);
        return Damage::new("another root", []);
    }
    let field = fields
        .keys()
        .nth(random.below(fields.len()))
        .expect("it is not empty")
        .clone();
    if random.once_in(8) {
        fields.shift_remove(&field);
        return Damage::new(format!("no {field}"), [field]);
    }
    let place = below(&mut fields[&field], random);
    *place = match place {
        Value::Number(number) if random.once_in(2) && number.is_u64() => {
            values::size(number.as_u64().expect("it is one"), random).into()
        }
        _ => values::value(random),
    };
    let mut what = format!("{field}: {place}");
    what.truncate(what.floor_char_boundary(200));
    Damage::new(what, [field])
}

/// A value that is in another at some depth, or the other itself: further down as often as not.
fn below<'v>(value: &'v mut Value, random: &mut Random<'_>) -> &'v mut Value {
    let len = match value {
        Value::Object(inner) => inner.len(),
        Value::Array(inner) => inner.len(),
        _ => 0,
    };
    if len == 0 || random.once_in(3) {
        return value;
    }
    let index = random.below(len);
    let inner = match value {
        Value::Object(inner) => inner.values_mut().nth(index),
        Value::Array(inner) => inner.get_mut(index),
        _ => None,
    };
    below(inner.expect("the index is below its length"), random)
}
