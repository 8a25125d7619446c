//! Jinja as transformers sets it up for chat templates.

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::{Kwargs, Rest, ValueKind, from_args};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Output, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::python::Style;

/// How many steps a template may take: a second of them, and hundreds for each of ten thousand messages. A template is
/// a program that comes with a model, and it runs when the model is loaded.
const STEPS: u64 = 10_000_000;

/// An environment with `trim_blocks`, `lstrip_blocks`, Python's methods and spelling, `tojson`,
/// `raise_exception` and `strftime_now`.
pub(super) fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    env.set_trim_blocks(true);
    env.set_lstrip_blocks(true);
    env.set_fuel(Some(STEPS));
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_formatter(print);
    env.set_unknown_method_callback(unknown_method_callback);
    env.add_filter("tojson", tojson);
    env.add_filter("string", |value: &Value| text(value));
    env.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    env.add_function("strftime_now", |format: &str| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        strftime(format, now.as_secs())
    });
    env
}

/// Rewrites `{% generation %}` blocks, which mark what a training loss counts, as blocks that only
/// open a scope: they render alike.
pub(super) fn without_generation_tags(source: &str) -> String {
    let mut result = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, block) = rest.split_at(start);
        // Not in the opening itself: `{%}` closes nothing.
        let Some(end) = block[2..].find("%}").map(|end| end + 2) else {
            break;
        };
        result.push_str(before);
        let block = &block[..end + 2];
        let name = block[2..end].trim_matches(['-', '+']).trim();
        match name {
            "generation" | "endgeneration" => {
                result.push_str(&block.replace("generation", "with"));
            }
            _ => result.push_str(block),
        }
        rest = &rest[start + end + 2..];
    }
    result + rest
}

fn print(out: &mut Output, _: &State, value: &Value) -> Result<(), Error> {
    out.write_str(&text(value)).map_err(Error::from)
}

/// Python's `str`, which is where `True`, `None` and `{'a': 1}` in a prompt come from.
fn text(value: &Value) -> String {
    let python = match value.kind() {
        ValueKind::Bool | ValueKind::None | ValueKind::Number | ValueKind::Seq | ValueKind::Map => {
            serde_json::to_value(value).ok()
        }
        _ => None,
    };
    python.map_or_else(|| value.to_string(), |value| Style::repr().write(&value))
}

/// `json.dumps`, with the arguments that transformers lets through and its order of them.
fn tojson(value: &Value, arguments: Rest<Value>) -> Result<Value, Error> {
    let (positional, kwargs): (&[Value], Kwargs) = from_args(&arguments)?;
    let argument = |position: usize, name: &str| -> Result<Option<Value>, Error> {
        let given = match positional.get(position) {
            Some(value) => Some(value.clone()),
            None => kwargs.get(name)?,
        };
        Ok(given.filter(|value: &Value| !value.is_none() && !value.is_undefined()))
    };
    let is_true = |value: Option<Value>| value.is_some_and(|value| value.is_true());

    let mut style = Style::json(is_true(argument(0, "ensure_ascii")?));
    if let Some(indent) = argument(1, "indent")? {
        style.item_separator = ",".into();
        style.indent = Some(match indent.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(usize::try_from(indent)?.min(64)),
        });
    }
    if let Some(separators) = argument(2, "separators")? {
        let given: Vec<String> = separators.try_iter()?.map(|s| s.to_string()).collect();
        let [item, key] = <[String; 2]>::try_from(given)
            .map_err(|given| refused(format!("tojson: separators: expected two, found {}", given.len())))?;
        style.item_separator = item;
        style.key_separator = key;
    }
    let sorted = is_true(argument(3, "sort_keys")?);
    kwargs.assert_all_used()?;

    if value.is_undefined() {
        return Err(refused("tojson: an undefined value is no JSON".into()));
    }
    let mut json = serde_json::to_value(value).map_err(|error| refused(format!("tojson: {error}")))?;
    if sorted {
        json.sort_all_objects();
    }
    Ok(Value::from(style.write(&json)))
}

fn refused(message: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

/// A moment in UTC by Python's `strftime` codes; those that a template has use for.
fn strftime(format: &str, seconds: u64) -> Result<String, Error> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = [
        "Thursday",
        "Friday",
        "Saturday",
        "Sunday",
        "Monday",
        "Tuesday",
        "Wednesday",
    ];
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    let weekday = DAYS[(days % 7) as usize];
    let (year, month, day) = civil(days);
    let month_name = MONTHS[month as usize - 1];

    let mut out = String::new();
    let mut codes = format.chars();
    while let Some(c) = codes.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let code = codes.next();
        // `%-d`: glibc's way to leave the zeros away.
        let (code, width) = match code {
            Some('-') => (codes.next(), 1),
            code => (code, 2),
        };
        match code {
            Some('Y') => write!(out, "{year}"),
            Some('y') => write!(out, "{:0width$}", year % 100),
            Some('m') => write!(out, "{month:0width$}"),
            Some('d') => write!(out, "{day:0width$}"),
            Some('H') => write!(out, "{hour:0width$}"),
            Some('I') => write!(out, "{:0width$}", (hour + 11) % 12 + 1),
            Some('M') => write!(out, "{minute:0width$}"),
            Some('S') => write!(out, "{:0width$}", second % 60),
            Some('p') => write!(out, "{}", if hour < 12 { "AM" } else { "PM" }),
            Some('B') => write!(out, "{month_name}"),
            Some('b') => write!(out, "{}", &month_name[..3]),
            Some('A') => write!(out, "{weekday}"),
            Some('a') => write!(out, "{}", &weekday[..3]),
            Some('F') => write!(out, "{year}-{month:02}-{day:02}"),
            Some('T') => write!(out, "{hour:02}:{minute:02}:{:02}", second % 60),
            Some('%') => write!(out, "%"),
            _ => {
                return Err(refused(format!(
                    "strftime_now: {format:?} has a code that is not known here; known are \
                     Y y m d H I M S p B b A a F T %"
                )));
            }
        }?;
    }
    Ok(out)
}

/// Year, month and day of a day counted from 1970-01-01 (Howard Hinnant's `civil_from_days`).
fn civil(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468;
    let (era, of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let day_of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day_of_year - (153 * shifted + 2) / 5 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str) -> Result<String, Error> {
        environment().render_str(source, ())
    }

    /// `date -u -d @N` gives the same.
    #[test]
    fn dates() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00 Thu 12 AM 1 January"),
            (951_782_400, "2000-02-29 00:00:00 Tue 12 AM 29 February"),
            (1_735_689_599, "2024-12-31 23:59:59 Tue 11 PM 31 December"),
            (4_107_542_400, "2100-03-01 00:00:00 Mon 12 AM 1 March"),
        ] {
            assert_eq!(
                strftime("%Y-%m-%d %H:%M:%S %a %I %p %-d %B", seconds).unwrap(),
                text
            );
            assert_eq!(strftime("%F %T", seconds).unwrap(), text[..19]);
        }
        assert_eq!(strftime("100%% %b %y %A", 0).unwrap(), "100% Jan 70 Thursday");
        assert!(strftime("%Q", 0).is_err());
        assert!(strftime("%", 0).is_err());
        assert!(*render("{{ strftime_now('%Y') }}").unwrap() >= *"2025");
    }

    #[test]
    fn generation_blocks_render_as_their_contents() {
        let source =
            "{% set x = 1 %}a \n{%- generation -%} b{% set x = 2 %}{{ x }} {%endgeneration+%}\nc{{ x }}";
        assert_eq!(render(&without_generation_tags(source)).unwrap(), "ab2 \nc1");
        for unchanged in [
            "generation {% if generation %}{% endif %}",
            "{% open",
            "{{ '{%' }}",
        ] {
            assert_eq!(without_generation_tags(unchanged), unchanged);
        }
    }

    #[test]
    fn a_template_can_refuse() {
        let error = render("{{ raise_exception('Roles must alternate') }}").unwrap_err();
        assert!(error.to_string().contains("Roles must alternate"), "{error}");
    }

    #[test]
    fn a_template_ends() {
        let long = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
        let error = render(long).unwrap_err();
        assert!(error.to_string().contains("fuel"), "{error}");
    }

    #[test]
    fn undefined_is_empty_but_is_no_json() {
        assert_eq!(render("[{{ nothing }}]").unwrap(), "[]");
        assert!(render("{{ nothing | tojson }}").is_err());
        assert!(render("{{ nothing.attribute }}").is_err());
        assert!(render("{{ 1 | tojson(colour=1) }}").is_err());
        assert!(render("{{ 1 | tojson(separators=[',']) }}").is_err());
    }
}
