//! Values as Python writes them, for templates that were written for Python.

use serde_json::Value;

/// What differs between `json.dumps` and `repr`.
#[derive(Debug, Clone)]
pub(super) struct Style {
    none: &'static str,
    yes: &'static str,
    no: &'static str,
    quote: fn(&mut String, &str),
    /// Between the items of a list or a mapping.
    pub(super) item_separator: String,
    /// Between a key and its value.
    pub(super) key_separator: String,
    /// One level of indentation; all on one line without.
    pub(super) indent: Option<String>,
}

impl Style {
    /// `json.dumps(…, ensure_ascii=…)` with its other defaults.
    pub(super) fn json(ensure_ascii: bool) -> Self {
        Self {
            none: "null",
            yes: "true",
            no: "false",
            quote: if ensure_ascii { quote_ascii } else { quote_json },
            ..Self::repr()
        }
    }

    /// `repr`, and `str` of everything but strings.
    pub(super) fn repr() -> Self {
        Self {
            none: "None",
            yes: "True",
            no: "False",
            quote: quote_repr,
            item_separator: ", ".into(),
            key_separator: ": ".into(),
            indent: None,
        }
    }

    pub(super) fn write(&self, value: &Value) -> String {
        let mut out = String::new();
        self.value(&mut out, value, 0);
        out
    }

    fn value(&self, out: &mut String, value: &Value, level: usize) {
        match value {
            Value::Null => out.push_str(self.none),
            Value::Bool(true) => out.push_str(self.yes),
            Value::Bool(false) => out.push_str(self.no),
            Value::Number(number) => match number.as_f64() {
                Some(float) if number.is_f64() => out.push_str(&float_text(float)),
                _ => out.push_str(&number.to_string()),
            },
            Value::String(text) => (self.quote)(out, text),
            Value::Array(items) => self.items(out, "[]", items, level, |out, item| {
                self.value(out, item, level + 1);
            }),
            Value::Object(fields) => self.items(out, "{}", fields, level, |out, (key, field)| {
                (self.quote)(out, key);
                out.push_str(&self.key_separator);
                self.value(out, field, level + 1);
            }),
        }
    }

    fn items<I: IntoIterator>(
        &self,
        out: &mut String,
        brackets: &str,
        items: I,
        level: usize,
        write: impl Fn(&mut String, I::Item),
    ) {
        let new_line = |out: &mut String, level: usize| {
            if let Some(indent) = &self.indent {
                out.push('\n');
                out.push_str(&indent.repeat(level));
            }
        };
        let (open, close) = brackets.split_at(1);
        out.push_str(open);
        let mut empty = true;
        for item in items {
            if !empty {
                out.push_str(&self.item_separator);
            }
            empty = false;
            new_line(out, level + 1);
            write(out, item);
        }
        if !empty {
            new_line(out, level);
        }
        out.push_str(close);
    }
}

/// The shortest digits that read back as the number, with an exponent where Python writes one.
fn float_text(float: f64) -> String {
    let scientific = format!("{float:e}");
    let Some((digits, exponent)) = scientific.split_once('e') else {
        return scientific;
    };
    match exponent.parse::<i32>() {
        Ok(exponent) if !(-4..16).contains(&exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.abs())
        }
        _ => format!("{float:?}"),
    }
}

fn quote_json(out: &mut String, text: &str) {
    quote_escaping(out, text, |_| false);
}

fn quote_ascii(out: &mut String, text: &str) {
    quote_escaping(out, text, |c| c >= '\u{7f}');
}

fn quote_escaping(out: &mut String, text: &str, escaped: fn(char) -> bool) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if c < ' ' || escaped(c) => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

fn quote_repr(out: &mut String, text: &str) {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => out.extend(['\\', c]),
            c if c < ' ' || c == '\u{7f}' => out.push_str(&format!("\\x{:02x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push(quote);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What CPython 3 prints.
    #[test]
    fn floats() {
        for (float, text) in [
            (1.0, "1.0"),
            (-0.0, "-0.0"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (-1.25e-7, "-1.25e-07"),
            (123456789.125, "123456789.125"),
        ] {
            assert_eq!(float_text(float), text);
        }
    }

    #[test]
    fn strings() {
        let text = "a'b\"c\\\n\u{1}\u{7f}é🦀</x>";
        let value = Value::from(text);
        assert_eq!(
            Style::json(false).write(&value),
            "\"a'b\\\"c\\\\\\n\\u0001\u{7f}é🦀</x>\""
        );
        assert_eq!(
            Style::json(true).write(&value),
            "\"a'b\\\"c\\\\\\n\\u0001\\u007f\\u00e9\\ud83e\\udd80</x>\""
        );
        assert_eq!(Style::repr().write(&value), "'a\\'b\"c\\\\\\n\\x01\\x7fé🦀</x>'");
        assert_eq!(Style::repr().write(&Value::from("it's")), "\"it's\"");
    }
}
