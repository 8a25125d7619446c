//! The comparison that criterion cannot make: all contenders and the machine's limits in turn, round by round, so
//! that a machine whose speed drifts is as fast for one as for the other.

use crate::case::{Bound, Case};
use candle_mmfp4::cpu::{Executor, roofline};
use std::time::{Duration, Instant};

/// How long a contender's turn takes at least, and how many rounds count; one more goes before them.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    pub turn: Duration,
    pub rounds: usize,
}

/// A pause before each turn: until then another side's threads may still wait for work on the processor.
const SETTLE: Duration = Duration::from_millis(2);

/// A number a round.
#[derive(Debug, Clone, Default)]
pub struct Samples(Vec<f64>);

impl Samples {
    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        match sorted.len() {
            0 => f64::NAN,
            even if even % 2 == 0 => (sorted[middle - 1] + sorted[middle]) / 2.0,
            _ => sorted[middle],
        }
    }

    pub fn min(&self) -> f64 {
        self.0.iter().copied().fold(f64::NAN, f64::min)
    }

    pub fn max(&self) -> f64 {
        self.0.iter().copied().fold(f64::NAN, f64::max)
    }
}

/// What the rounds of a case gave.
#[derive(Debug)]
pub struct Outcome {
    pub title: String,
    pub bound: Bound,
    pub peer: Option<&'static str>,
    /// Bytes or operations a second that the machine reached.
    pub limit: Samples,
    /// Likewise of the other kind, where a contender has work of it.
    pub other: Samples,
    pub rows: Vec<Row>,
}

/// A contender's.
#[derive(Debug)]
pub struct Row {
    pub name: &'static str,
    /// Bytes or operations a call.
    pub work: usize,
    /// Of the other kind.
    pub other: Option<usize>,
    /// Seconds a call.
    pub seconds: Samples,
}

/// Runs those contenders of a case that criterion has run; `None` where it has run none.
pub fn run(executor: &Executor, case: &mut Case, effort: Effort) -> Option<Outcome> {
    let (mut rows, mut contenders, mut regions) = (Vec::new(), Vec::new(), Vec::new());
    for contender in &mut case.contenders {
        let (name, work, other) = (contender.name, contender.work, contender.other);
        if let Some(ready) = contender.if_ready() {
            if regions.is_empty() {
                regions.clone_from(&ready.regions);
            }
            contenders.push(ready);
            rows.push(Row {
                name,
                work,
                other,
                seconds: Samples::default(),
            });
        }
    }
    if contenders.is_empty() {
        return None;
    }
    let regions: Vec<&[u8]> = regions.iter().map(|bytes| &bytes[..]).collect();
    let reach = |bound: Bound| match bound {
        // Nothing of this crate's runs.
        Bound::Bytes if regions.is_empty() => f64::NAN,
        Bound::Bytes => roofline::read_bandwidth(executor, &regions),
        Bound::Operations => roofline::dot_peak(executor),
        Bound::Floats => roofline::float_peak(executor),
    };
    let has_other = rows.iter().any(|row| row.other.is_some());
    let (mut limit, mut other) = (Samples::default(), Samples::default());
    for round in 0..=effort.rounds {
        let reached = reach(case.bound);
        let other_reached = has_other.then(|| reach(case.bound.other()));
        let turns: Vec<f64> = (contenders.iter_mut())
            .map(|ready| turn(&mut ready.call, effort.turn))
            .collect();
        if round > 0 {
            limit.0.push(reached);
            other.0.extend(other_reached);
            for (row, seconds) in rows.iter_mut().zip(turns) {
                row.seconds.0.push(seconds);
            }
        }
    }
    Some(Outcome {
        title: case.title.clone(),
        bound: case.bound,
        peer: case.peer,
        limit,
        other,
        rows,
    })
}

/// Seconds a call takes.
fn turn(call: &mut dyn FnMut(), at_least: Duration) -> f64 {
    std::thread::sleep(SETTLE);
    let (start, mut count) = (Instant::now(), 0u32);
    loop {
        call();
        count += 1;
        let elapsed = start.elapsed();
        if elapsed >= at_least {
            return elapsed.as_secs_f64() / f64::from(count);
        }
    }
}
