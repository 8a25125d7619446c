//! Where the time of forward passes goes: an observer with a clock.

use super::Site;
use crate::Result;
use candle_core::Device;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::AddAssign;
use std::time::{Duration, Instant};

#[cfg(target_os = "macos")]
use crate::metal::device::Timestamps;

/// There is no GPU here whose time could be taken. (It belongs to a thread wherever there is one.)
#[cfg(not(target_os = "macos"))]
#[derive(Debug)]
struct Timestamps(std::marker::PhantomData<*const ()>);

#[cfg(not(target_os = "macos"))]
impl Timestamps {
    fn start() -> Self {
        Self(std::marker::PhantomData)
    }

    fn take(&mut self) -> Duration {
        Duration::ZERO
    }

    fn take_waits(&mut self) -> Duration {
        Duration::ZERO
    }
}

/// What a GPU did between two calls.
#[derive(Debug, Clone, Copy, Default)]
struct GpuTime {
    /// Plans of this crate: from the start to the end of their command buffers, by the GPU's clock.
    kernels: Duration,
    /// Ops of Candle's: how long the host waited for what they had encoded.
    candle: Duration,
}

impl AddAssign for GpuTime {
    fn add_assign(&mut self, other: Self) {
        self.kernels += other.kernels;
        self.candle += other.candle;
    }
}

/// Takes the time between the calls that an [`Observer`](super::Observer) gets, by op and by layer.
///
/// The time of an op is all that passed since the op before: RoPE, the cache and `kv_b` count as `attention`, the first
/// residual addition as `post_attention_layernorm`, the second one as `layer`; where one kernel takes `q_a_layernorm` into
/// the product behind it, both are `q_b_proj`. A device that works while the program goes on is waited for after every op,
/// so that a pass takes longer than without; see [`Clock`]. On a Mac one profile at a time is for a thread.
///
/// ```
/// use candle_core::Device;
/// use candle_mmfp4::models::{Phase, Profile};
/// use candle_mmfp4::models::glm4_moe_lite::{Logits, Model, Sequence};
///
/// let (model, _) = Model::from_folder("examples/demo-model", &Default::default(), &Device::Cpu)?;
/// let mut profile = Profile::new(model.device());
/// let mut alone = [Sequence { tokens: &[1, 2, 3], position: 0, cache: None }];
/// profile.begin(Phase::Prompt);
/// let mut observer = |site, _: &_, _: &_| profile.see(site);
/// model.forward_batch(&mut alone, Logits::Last, Some(&mut observer))?;
/// println!("{}", profile.report());
/// # Ok::<(), candle_mmfp4::Error>(())
/// ```
#[derive(Debug)]
pub struct Profile {
    device: Device,
    gpu: Timestamps,
    last: Option<Instant>,
    phase: Phase,
    /// Of [`Phase::ALL`].
    times: [Times; 2],
}

/// Which passes are summed up together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Those that compute a prompt, or a part of one.
    Prompt,
    /// Those that compute one more token: of that token alone or, without a cache, of all so far.
    Generation,
}

impl Phase {
    const ALL: [Self; 2] = [Self::Prompt, Self::Generation];
}

/// What the times of a [`ProfileReport`] are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Clock {
    /// The host's clock: ops are done when they return.
    Host,
    /// The host's clock, with a wait for the GPU after each op; that wait is part of an op's time. Beside it stand the GPU's
    /// own time of this crate's kernels, from the timestamps of their command buffers, and the wait for Candle's own ops,
    /// whose command buffers nobody else sees. A GPU that waits between ops may be clocked lower than one that is kept
    /// busy.
    HostWithWaits,
}

#[derive(Debug, Default)]
struct Times {
    passes: usize,
    ops: Vec<Sum<&'static str>>,
    layers: Vec<Sum<Option<usize>>>,
}

#[derive(Debug)]
struct Sum<K> {
    key: K,
    calls: usize,
    host: Duration,
    gpu: GpuTime,
}

/// Sums of time of many passes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProfileReport {
    /// What the times are.
    pub clock: Clock,
    /// A part for each kind of pass that there was.
    pub phases: Vec<PhaseReport>,
}

/// The times of passes of one kind.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PhaseReport {
    /// Which passes.
    pub phase: Phase,
    /// How many.
    pub passes: usize,
    /// All their ops together, in milliseconds.
    pub total_ms: f64,
    /// A row for each op, the most time first.
    pub ops: Vec<ProfileRow>,
    /// A row for each layer in order, and one named `outside` for embeddings, final norm and head.
    pub layers: Vec<ProfileRow>,
}

/// The time of an op in all layers, or of a layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProfileRow {
    /// The op as [`Site`] names it, or the layer's number.
    pub name: String,
    /// How often it ran.
    pub calls: usize,
    /// The time of all calls.
    pub total_ms: f64,
    /// Of the phase's total.
    pub share: f64,
    /// The mean of a call, in microseconds.
    pub call_us: f64,
    /// The GPU's time within `total_ms` of this crate's kernels. `None` where none is known.
    pub gpu_ms: Option<f64>,
    /// What the host waited within `total_ms` for Candle's own ops, as those of attention and of the cache are: from handing
    /// them over to their end, a few microseconds even where there were none. `None` where ops are done when they return.
    pub candle_ms: Option<f64>,
}

impl Profile {
    /// An empty profile of passes on `device`.
    pub fn new(device: &Device) -> Self {
        Self {
            device: device.clone(),
            gpu: Timestamps::start(),
            last: None,
            phase: Phase::Prompt,
            times: Default::default(),
        }
    }

    /// Starts the clock for a pass of this kind: to be called before each, whose first op is not counted otherwise.
    pub fn begin(&mut self, phase: Phase) {
        self.phase = phase;
        self.gpu.take();
        self.gpu.take_waits();
        self.last = Some(Instant::now());
    }

    /// Notes that the op of `site` is done; what an [`Observer`](super::Observer) calls.
    ///
    /// # Errors
    /// Those of the device that is waited for.
    pub fn see(&mut self, site: Site) -> Result<()> {
        let done = Instant::now();
        self.device.synchronize()?;
        let now = Instant::now();
        let gpu = GpuTime {
            kernels: self.gpu.take(),
            // Before each plan, which does not begin until Candle's queue is empty, and now.
            candle: self.gpu.take_waits() + (now - done),
        };
        if site.op == "embed_tokens" {
            self.times[self.phase as usize].passes += 1;
        }
        let times = &mut self.times[self.phase as usize];
        if let Some(last) = self.last {
            add(&mut times.ops, site.op, true, now - last, gpu);
            let is_last = site.op == "layer" || site.op == "lm_head";
            add(&mut times.layers, site.layer, is_last, now - last, gpu);
        }
        // What comes between two passes is nobody's; nor is what this method takes.
        self.last = (site.op != "lm_head").then(Instant::now);
        Ok(())
    }

    /// The sums so far.
    pub fn report(&self) -> ProfileReport {
        let clock = match self.device.is_cpu() {
            true => Clock::Host,
            false => Clock::HostWithWaits,
        };
        let phases = Phase::ALL.into_iter().zip(&self.times);
        let phases = phases.filter(|(_, times)| times.passes > 0);
        ProfileReport {
            clock,
            phases: phases.map(|(phase, times)| times.report(phase, clock)).collect(),
        }
    }
}

/// Adds to the sum of `key`, a call where `counts` says so.
fn add<K: PartialEq>(sums: &mut Vec<Sum<K>>, key: K, counts: bool, host: Duration, gpu: GpuTime) {
    let index = sums.iter().position(|sum| sum.key == key).unwrap_or_else(|| {
        sums.push(Sum {
            key,
            calls: 0,
            host: Duration::ZERO,
            gpu: GpuTime::default(),
        });
        sums.len() - 1
    });
    let sum = &mut sums[index];
    sum.calls += usize::from(counts);
    sum.host += host;
    sum.gpu += gpu;
}

impl Times {
    fn report(&self, phase: Phase, clock: Clock) -> PhaseReport {
        let total: Duration = self.ops.iter().map(|sum| sum.host).sum();
        let mut ops: Vec<_> = self
            .ops
            .iter()
            .map(|sum| sum.row(sum.key.into(), total, clock))
            .collect();
        ops.sort_by(|a, b| b.total_ms.total_cmp(&a.total_ms));
        let mut layers: Vec<_> = self.layers.iter().collect();
        layers.sort_by_key(|sum| sum.key.unwrap_or(usize::MAX));
        let name = |key: Option<usize>| key.map_or("outside".into(), |layer| layer.to_string());
        PhaseReport {
            phase,
            passes: self.passes,
            total_ms: milliseconds(total),
            ops,
            layers: layers
                .into_iter()
                .map(|sum| sum.row(name(sum.key), total, clock))
                .collect(),
        }
    }
}

impl<K> Sum<K> {
    fn row(&self, name: String, total: Duration, clock: Clock) -> ProfileRow {
        let total_ms = milliseconds(self.host);
        ProfileRow {
            name,
            calls: self.calls,
            total_ms,
            share: total_ms / milliseconds(total).max(f64::MIN_POSITIVE),
            call_us: total_ms * 1e3 / self.calls.max(1) as f64,
            gpu_ms: (clock == Clock::HostWithWaits).then(|| milliseconds(self.gpu.kernels)),
            candle_ms: (clock == Clock::HostWithWaits).then(|| milliseconds(self.gpu.candle)),
        }
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Tables, each under a line that says what it is of.
impl fmt::Display for ProfileReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.clock {
            Clock::Host => "Time by the host's clock; what comes between two ops counts as the later one's.",
            Clock::HostWithWaits => {
                "Wall time with a synchronisation after each op, which a run without a profile does not have; `gpu` is \
                 what the timestamps of the command buffers say of this crate's kernels, `candle` the wait for Candle's \
                 own ops."
            }
        })?;
        for phase in &self.phases {
            let passes = match phase.phase {
                Phase::Prompt => "for the prompt",
                Phase::Generation => "for generated tokens",
            };
            let noun = if phase.passes == 1 { "pass" } else { "passes" };
            write!(
                f,
                "\n\n{} {noun} {passes}: {:.1} ms",
                phase.passes, phase.total_ms
            )?;
            table(f, "op", &phase.ops)?;
            f.write_str("\n")?;
            table(f, "layer", &phase.layers)?;
        }
        Ok(())
    }
}

fn table(f: &mut fmt::Formatter<'_>, head: &str, rows: &[ProfileRow]) -> fmt::Result {
    let longest = rows.iter().map(|row| row.name.len()).max().unwrap_or(0);
    let (width, has_gpu) = (
        longest.max(head.len()),
        rows.iter().any(|row| row.gpu_ms.is_some()),
    );
    write!(
        f,
        "\n{head:<width$}  {:>7}  {:>10}  {:>6}  {:>10}",
        "calls", "total ms", "share", "us a call"
    )?;
    if has_gpu {
        write!(f, "  {:>10}  {:>10}", "gpu ms", "candle ms")?;
    }
    for row in rows {
        let share = format!("{:.1} %", row.share * 100.0);
        write!(
            f,
            "\n{:<width$}  {:>7}  {:>10.2}  {share:>6}  {:>10.1}",
            row.name, row.calls, row.total_ms, row.call_us
        )?;
        for time in [row.gpu_ms, row.candle_ms].into_iter().flatten() {
            write!(f, "  {time:>10.2}")?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::glm4_moe_lite::{Logits, Model, Sequence};
    use candle_core::Tensor;

    fn pass(model: &Model, profile: &mut Profile, phase: Phase, tokens: &[u32]) -> Duration {
        let start = Instant::now();
        profile.begin(phase);
        let mut alone = [Sequence {
            tokens,
            position: 0,
            cache: None,
        }];
        let mut observer = |site: Site, _: &Tensor, _: &Tensor| profile.see(site);
        model
            .forward_batch(&mut alone, Logits::Last, Some(&mut observer))
            .unwrap();
        start.elapsed()
    }

    #[test]
    fn ops_and_layers_sum_up_to_the_pass() {
        let (model, _) =
            Model::from_folder("examples/demo-model", &Default::default(), &Device::Cpu).unwrap();
        let mut profile = Profile::new(model.device());
        let mut walls = [Duration::ZERO; 2];
        // A prompt of one token is one all the same, and without a cache so is a token generated of several.
        for tokens in [&[1, 2, 3][..], &[1, 2, 3], &[1]] {
            walls[0] += pass(&model, &mut profile, Phase::Prompt, tokens);
        }
        walls[1] += pass(&model, &mut profile, Phase::Generation, &[1, 2]);
        let report = profile.report();
        assert_eq!(report.clock, Clock::Host);
        let layers = model.config().layers.len();
        for ((phase, passes), wall) in report.phases.iter().zip([3, 1]).zip(walls) {
            assert_eq!((phase.passes, phase.layers.len()), (passes, layers + 1));
            assert!(phase.total_ms > 0.5 * milliseconds(wall) && phase.total_ms <= milliseconds(wall));
            for rows in [&phase.ops, &phase.layers] {
                let sum: f64 = rows.iter().map(|row| row.total_ms).sum();
                assert!((sum / phase.total_ms - 1.0).abs() < 1e-6);
                let shares: f64 = rows.iter().map(|row| row.share).sum();
                assert!((shares - 1.0).abs() < 1e-6);
                assert!(
                    rows.iter()
                        .all(|row| row.gpu_ms.is_none() && row.candle_ms.is_none())
                );
            }
            assert!(phase.layers.iter().all(|row| row.calls == passes), "{report}");
            let calls = |op: &str| phase.ops.iter().find(|row| row.name == op).map(|row| row.calls);
            assert_eq!(calls("attention"), Some(passes * layers));
            assert_eq!(calls("embed_tokens"), Some(passes));
            assert_eq!(calls("lm_head"), Some(passes));
            assert!(phase.ops.is_sorted_by(|a, b| a.total_ms >= b.total_ms));
        }
        assert_eq!(report.phases.len(), 2);
        assert!(
            report.to_string().contains("1 pass for generated tokens"),
            "{report}"
        );
        let text = serde_json::to_string(&report).unwrap();
        let back: ProfileReport = serde_json::from_str(&text).unwrap();
        assert_eq!(back.phases[0].ops.len(), report.phases[0].ops.len());
    }

    /// As on a Mac, whose clocks are not here.
    #[test]
    fn a_gpus_time_and_the_wait_for_candle_stand_beside_the_hosts() {
        let ms = Duration::from_millis;
        let gpu = |kernels, candle| GpuTime {
            kernels: ms(kernels),
            candle: ms(candle),
        };
        let mut times = Times {
            passes: 2,
            ..Times::default()
        };
        for (op, host, gpu) in [
            ("attention", 8, gpu(2, 5)),
            ("o_proj", 2, gpu(1, 0)),
            ("attention", 10, gpu(3, 6)),
        ] {
            add(&mut times.ops, op, true, ms(host), gpu);
        }
        let report = ProfileReport {
            clock: Clock::HostWithWaits,
            phases: vec![times.report(Phase::Generation, Clock::HostWithWaits)],
        };
        let rows = report.phases[0].ops.iter();
        let found: Vec<_> = rows
            .map(|row| {
                (
                    row.name.as_str(),
                    row.calls,
                    row.total_ms,
                    row.gpu_ms,
                    row.candle_ms,
                )
            })
            .collect();
        assert_eq!(
            found,
            [
                ("attention", 2, 18.0, Some(5.0), Some(11.0)),
                ("o_proj", 1, 2.0, Some(1.0), Some(0.0))
            ]
        );
        let text = report.to_string();
        let line = |name: &str| text.lines().find(|line| line.starts_with(name)).unwrap();
        assert!(line("op ").ends_with("gpu ms   candle ms"), "{text}");
        assert!(line("attention").ends_with(" 5.00       11.00"), "{text}");
    }

    #[test]
    fn what_comes_between_passes_is_nobodys() {
        let site = |op| Site { layer: None, op };
        let mut profile = Profile::new(&Device::Cpu);
        profile.see(site("embed_tokens")).unwrap();
        profile.see(site("lm_head")).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        profile.see(site("embed_tokens")).unwrap();
        profile.see(site("lm_head")).unwrap();
        let report = profile.report();
        // Nobody said when the passes began: their first op is not counted.
        assert_eq!(report.phases[0].ops.len(), 1);
        assert!(report.phases[0].total_ms < 40.0, "{report}");
    }
}
