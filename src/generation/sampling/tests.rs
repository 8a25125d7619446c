//! What is sampled, and how often.

use super::*;

/// The distribution by sorting everything, in f64.
fn reference(logits: &[f32], s: &Sampling, history: History<'_>) -> Vec<f64> {
    let mut l: Vec<f64> = logits.iter().map(|&x| f64::from(x)).collect();
    let generated = &history.tokens[history.prompt..];
    for (id, logit) in l.iter_mut().enumerate() {
        if history.tokens.contains(&(id as u32)) {
            let penalty = f64::from(s.repetition_penalty);
            *logit = if *logit > 0.0 {
                *logit / penalty
            } else {
                *logit * penalty
            };
        }
        let count = generated.iter().filter(|&&g| g as usize == id).count();
        if count > 0 {
            *logit -= f64::from(s.presence_penalty) + count as f64 * f64::from(s.frequency_penalty);
        }
        *logit += f64::from(*s.logit_bias.get(&(id as u32)).unwrap_or(&0.0));
        *logit /= f64::from(s.temperature);
    }
    let mut order: Vec<usize> = (0..l.len()).collect();
    order.sort_by(|&a, &b| l[b].total_cmp(&l[a]).then(a.cmp(&b)));
    if s.top_k > 0 && s.top_k < l.len() {
        let least = l[order[s.top_k - 1]];
        order.retain(|&id| l[id] >= least);
    }
    let softmax = |order: &[usize]| -> Vec<f64> {
        let e: Vec<f64> = order.iter().map(|&id| (l[id] - l[order[0]]).exp()).collect();
        let sum: f64 = e.iter().sum();
        e.into_iter().map(|x| x / sum).collect()
    };
    let mut before = 0.0;
    let mut kept = Vec::new();
    for (&id, p) in order.iter().zip(softmax(&order)) {
        if before < f64::from(s.top_p) {
            kept.push(id);
        }
        before += p;
    }
    let p = softmax(&kept);
    let keep = p.iter().filter(|&&x| x >= f64::from(s.min_p) * p[0]).count();
    kept.truncate(keep);
    let mut result = vec![0.0; l.len()];
    for (&id, p) in kept.iter().zip(softmax(&kept)) {
        result[id] = p;
    }
    result
}

/// Normal-looking logits with a few likely tokens, as a language model's.
fn logits(random: &mut Random, count: usize, spread: f32) -> Vec<f32> {
    (0..count)
        .map(|_| ((0..4).map(|_| random.uniform()).sum::<f64>() - 2.0) as f32 * spread)
        .collect()
}

/// Draws and compares with the reference: nothing outside its support, and chi-square in it.
fn compare(logits: &[f32], sampling: Sampling, history: History<'_>) {
    let draws = 20_000;
    let expected = reference(logits, &sampling, history);
    let mut sampler = Sampler::new(sampling.clone()).unwrap();
    let mut seen = vec![0u32; logits.len()];
    for _ in 0..draws {
        seen[sampler.sample(logits, history).unwrap().id as usize] += 1;
    }
    // Tokens expected less than 10 times share one cell.
    let (mut chi, mut cells, mut rare, mut rare_seen) = (0.0, 0, 0.0, 0.0);
    for (&p, &count) in expected.iter().zip(&seen) {
        assert!(p > 0.0 || count == 0, "{sampling:?}");
        let (wanted, count) = (p * f64::from(draws), f64::from(count));
        if wanted < 10.0 {
            rare += wanted;
            rare_seen += count;
        } else {
            chi += (count - wanted).powi(2) / wanted;
            cells += 1;
        }
    }
    if rare > 5.0 {
        chi += (rare_seen - rare).powi(2) / rare;
        cells += 1;
    }
    // Wilson-Hilferty: a normal deviate of 4 is one chance in 30,000.
    let degrees = f64::from((cells - 1).max(1));
    let deviate = ((chi / degrees).cbrt() - (1.0 - 2.0 / (9.0 * degrees))) / (2.0 / (9.0 * degrees)).sqrt();
    assert!(deviate < 4.0, "chi² {chi} over {degrees}: {sampling:?}");
}

fn seeded(seed: u64) -> Sampling {
    Sampling {
        temperature: 1.0,
        seed: Some(seed),
        ..Sampling::default()
    }
}

#[test]
fn every_filter_draws_from_the_sorted_reference() {
    let mut random = Random::new(5);
    let row = logits(&mut random, 60, 3.0);
    let tokens = [3, 3, 3, 9, 40, 9, 9, 17, 58];
    let history = History {
        tokens: &tokens,
        prompt: 4,
    };
    let base = seeded(11);
    for sampling in [
        base.clone(),
        Sampling {
            temperature: 0.4,
            ..base.clone()
        },
        Sampling {
            temperature: 2.5,
            ..base.clone()
        },
        Sampling {
            top_k: 5,
            ..base.clone()
        },
        Sampling {
            top_k: 1,
            ..base.clone()
        },
        Sampling {
            top_k: 1000,
            ..base.clone()
        },
        Sampling {
            top_p: 0.7,
            ..base.clone()
        },
        Sampling {
            top_p: 1e-6,
            ..base.clone()
        },
        Sampling {
            min_p: 0.2,
            ..base.clone()
        },
        Sampling {
            min_p: 1.0,
            ..base.clone()
        },
        Sampling {
            repetition_penalty: 1.8,
            ..base.clone()
        },
        Sampling {
            presence_penalty: 1.5,
            ..base.clone()
        },
        Sampling {
            frequency_penalty: 0.9,
            ..base.clone()
        },
        Sampling {
            logit_bias: [(2, 4.0), (7, -100.0)].into(),
            ..base.clone()
        },
        Sampling {
            temperature: 0.8,
            top_k: 30,
            top_p: 0.9,
            min_p: 0.02,
            repetition_penalty: 1.2,
            presence_penalty: 0.3,
            frequency_penalty: -0.2,
            logit_bias: [(5, 1.0)].into(),
            ..base
        },
    ] {
        compare(&row, sampling, history);
    }
}

#[test]
fn top_p_keeps_the_right_set_of_a_large_vocabulary() {
    let mut random = Random::new(6);
    for (spread, top_p) in [(0.5, 0.9), (3.0, 0.5), (12.0, 0.99), (0.0, 0.3)] {
        let row = logits(&mut random, 20_000, spread);
        let sampling = Sampling { top_p, ..seeded(0) };
        let expected = reference(&row, &sampling, History::default());
        let largest = row[argmax(&row) as usize];
        let weights: Vec<f32> = row.iter().map(|&l| exp(l - largest)).collect();
        let candidates = most_probable(&weights, top_p);
        let kept = expected.iter().filter(|&&p| p > 0.0).count();
        // Rounding may move the edge by a token; 0.9 of 20,000 nearly equal weights is no edge.
        assert!(
            candidates.len().abs_diff(kept) <= 1,
            "{} {kept}",
            candidates.len()
        );
        assert!(
            candidates[..kept - 1]
                .iter()
                .all(|&(id, _)| expected[id as usize] > 0.0)
        );
    }
}

#[test]
fn top_k_keeps_all_equals_of_the_last() {
    let mut sampler = Sampler::new(Sampling {
        top_k: 2,
        ..seeded(1)
    })
    .unwrap();
    let mut seen = [0; 4];
    for _ in 0..1000 {
        seen[sampler
            .sample(&[1.0, 2.0, 1.0, 0.5], History::default())
            .unwrap()
            .id as usize] += 1;
    }
    assert!(seen[0] > 0 && seen[2] > 0 && seen[3] == 0, "{seen:?}");
}

#[test]
fn greedy_is_the_first_largest_after_penalties_and_bias() {
    let row = [1.0, 3.0, 3.0, 2.9];
    let pick = |sampling: Sampling, history| Sampler::new(sampling).unwrap().sample(&row, history).unwrap();
    assert_eq!(pick(Sampling::default(), History::default()).id, 1);
    let biased = Sampling {
        logit_bias: [(0, 2.5)].into(),
        ..Sampling::default()
    };
    let chosen = pick(biased, History::default());
    assert_eq!(chosen.id, 0);
    // The log-probability is the model's own, whatever the bias.
    let sum: f64 = row.iter().map(|&l: &f32| f64::from(l).exp()).sum();
    assert!((f64::from(chosen.logprob) - (1.0 - sum.ln())).abs() < 1e-6);
    let history = History {
        tokens: &[1, 2],
        prompt: 1,
    };
    let repeated = Sampling {
        repetition_penalty: 1.5,
        ..Sampling::default()
    };
    assert_eq!(pick(repeated, history).id, 3);
    // The prompt does not count for OpenAI's penalties.
    let present = Sampling {
        presence_penalty: 1.0,
        ..Sampling::default()
    };
    assert_eq!(pick(present, history).id, 1);
}

#[test]
fn log_probabilities_are_the_models_most_probable_first() {
    let mut random = Random::new(8);
    let mut row = logits(&mut random, 5000, 4.0);
    row[77] = f32::NEG_INFINITY;
    row[4321] = row[1234];
    let sum: f64 = row.iter().map(|&l| f64::from(l).exp()).sum();
    let mut expected: Vec<(u32, f64)> = (0..).zip(row.iter().map(|&l| f64::from(l) - sum.ln())).collect();
    expected.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let sampling = Sampling {
        top_logprobs: 20,
        temperature: 0.7,
        top_k: 3,
        ..seeded(4)
    };
    let chosen = Sampler::new(sampling)
        .unwrap()
        .sample(&row, History::default())
        .unwrap();
    assert_eq!(chosen.top.len(), 20);
    for (&(id, logprob), &(expected_id, expected)) in chosen.top.iter().zip(&expected) {
        assert_eq!(id, expected_id);
        assert!((f64::from(logprob) - expected).abs() < 1e-5);
    }
    assert_eq!(
        chosen.top.iter().find(|&&(id, _)| id == chosen.id),
        Some(&(chosen.id, chosen.logprob))
    );
    let all = Sampling {
        top_logprobs: 9999,
        ..Sampling::default()
    };
    assert_eq!(
        Sampler::new(all)
            .unwrap()
            .sample(&row, History::default())
            .unwrap()
            .top
            .len(),
        5000
    );
}

#[test]
fn a_seed_decides_and_none_does_not() {
    let mut random = Random::new(9);
    let rows: Vec<Vec<f32>> = (0..50).map(|_| logits(&mut random, 500, 1.0)).collect();
    let run = |seed| -> Vec<u32> {
        let mut sampler = Sampler::new(Sampling { seed, ..seeded(0) }).unwrap();
        rows.iter()
            .map(|row| sampler.sample(row, History::default()).unwrap().id)
            .collect()
    };
    assert_eq!(run(Some(1)), run(Some(1)));
    assert_ne!(run(Some(1)), run(Some(2)));
    assert_ne!(run(None), run(None));
}

#[test]
fn counts_follow_a_history_that_grows_shrinks_or_changes() {
    let mut counts = Counts::default();
    let mut random = Random::new(10);
    let mut tokens: Vec<u32> = Vec::new();
    for _ in 0..500 {
        match random.below(10) {
            0 => tokens.truncate(random.below(tokens.len() + 1)),
            1 if !tokens.is_empty() => {
                let at = random.below(tokens.len());
                tokens[at] = random.below(20) as u32;
            }
            _ => tokens.push(random.below(20) as u32),
        }
        let prompt = if random.below(20) == 0 { 2 } else { 3 }.min(tokens.len());
        counts
            .update(
                History {
                    tokens: &tokens,
                    prompt,
                },
                20,
            )
            .unwrap();
        let mut expected: HashMap<u32, u32> = HashMap::new();
        for (index, &id) in tokens.iter().enumerate() {
            *expected.entry(id).or_default() += u32::from(index >= prompt);
        }
        assert_eq!(counts.generated, expected);
    }
}

#[test]
fn extreme_temperatures_and_masked_tokens() {
    for temperature in [f32::MIN_POSITIVE, 1e-6, 1e30] {
        let mut sampler = Sampler::new(Sampling {
            temperature,
            ..seeded(2)
        })
        .unwrap();
        for _ in 0..200 {
            let id = sampler
                .sample(&[5.0, f32::NEG_INFINITY, 5.5, -3e38], History::default())
                .unwrap()
                .id;
            assert!(if temperature < 1.0 { id == 2 } else { id != 1 });
        }
    }
}

#[test]
fn bad_logits_and_bad_settings_are_refused() {
    let sample = |sampling: Sampling, row: &[f32], tokens: &[u32]| {
        Sampler::new(sampling)?.sample(row, History { tokens, prompt: 0 })
    };
    for row in [
        &[1.0, f32::NAN][..],
        &[f32::INFINITY, 0.0],
        &[f32::NEG_INFINITY],
        &[],
    ] {
        for sampling in [Sampling::default(), seeded(0)] {
            assert!(
                matches!(sample(sampling, row, &[]), Err(Error::Logits(_))),
                "{row:?}"
            );
        }
    }
    let penalty = Sampling {
        presence_penalty: 1.0,
        ..Sampling::default()
    };
    assert!(matches!(
        sample(penalty, &[0.0], &[0, 5]),
        Err(Error::TokenId {
            id: 5,
            index: 1,
            vocab_size: 1
        })
    ));
    let base = Sampling::default;
    for (sampling, field) in [
        (
            Sampling {
                temperature: -1.0,
                ..base()
            },
            "temperature",
        ),
        (
            Sampling {
                temperature: f32::NAN,
                ..base()
            },
            "temperature",
        ),
        (
            Sampling {
                temperature: f32::INFINITY,
                ..base()
            },
            "temperature",
        ),
        (Sampling { top_p: 0.0, ..base() }, "top_p"),
        (Sampling { top_p: 1.1, ..base() }, "top_p"),
        (Sampling { min_p: 1.1, ..base() }, "min_p"),
        (
            Sampling {
                repetition_penalty: 0.0,
                ..base()
            },
            "repetition_penalty",
        ),
        (
            Sampling {
                presence_penalty: f32::NAN,
                ..base()
            },
            "presence_penalty",
        ),
        (
            Sampling {
                frequency_penalty: f32::INFINITY,
                ..base()
            },
            "frequency_penalty",
        ),
        (
            Sampling {
                logit_bias: [(0, f32::NAN)].into(),
                ..base()
            },
            "logit_bias",
        ),
        (
            Sampling {
                logit_bias: [(3, 1.0)].into(),
                ..base()
            },
            "logit_bias",
        ),
    ] {
        let error = sample(sampling, &[0.0, 1.0], &[]).unwrap_err();
        assert!(
            matches!(error, Error::Argument { argument, .. } if argument == field),
            "{error}"
        );
    }
}
