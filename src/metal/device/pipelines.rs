//! Compiled kernels, a set for each device.

use super::OP;
use crate::metal::plan::{Constant, Launch, limits};
use crate::metal::source;
use crate::{Error, Result};
use candle_metal_kernels::metal::{ComputePipeline, ConstantValues, Device, Library, Value};
use objc2_metal::{MTLCompileOptions, MTLLanguageVersion, MTLMathMode};
use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

type Key = (String, Vec<(u16, Constant)>);

/// The library and the pipelines made of it so far.
pub(super) struct Pipelines {
    library: Library,
    ready: RwLock<HashMap<Key, ComputePipeline>>,
}

impl Pipelines {
    /// Those of a device; its library is compiled the first time.
    pub fn of(device: &Device) -> Result<Arc<Self>> {
        static ALL: RwLock<Option<HashMap<u64, Arc<Pipelines>>>> = RwLock::new(None);
        let id = device.registry_id();
        let known = ALL.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = known.as_ref().and_then(|all| all.get(&id)) {
            return Ok(Arc::clone(found));
        }
        drop(known);
        let new = Arc::new(Self::compile(device)?);
        let mut all = ALL.write().unwrap_or_else(PoisonError::into_inner);
        Ok(Arc::clone(all.get_or_insert_default().entry(id).or_insert(new)))
    }

    fn compile(device: &Device) -> Result<Self> {
        let options = MTLCompileOptions::new();
        options.setLanguageVersion(MTLLanguageVersion::Version3_1);
        // NaN and infinity in the input are to stay visible in the output. (macOS 15; Candle needs it anyway.)
        options.setMathMode(MTLMathMode::Safe);
        let library = device
            .new_library_with_source(&source::library(), Some(&options))
            .map_err(|error| {
                Error::argument(
                    OP,
                    "kernels",
                    "sources that this system compiles",
                    error.to_string(),
                )
            })?;
        Ok(Self {
            library,
            ready: RwLock::default(),
        })
    }

    /// The pipeline of a launch, made the first time.
    pub fn get(&self, device: &Device, launch: &Launch) -> Result<ComputePipeline> {
        let key = (launch.kernel.clone(), launch.constants.clone());
        let ready = self.ready.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(pipeline) = ready.get(&key) {
            return Ok(pipeline.clone());
        }
        drop(ready);
        let constants = launch.constants.iter().map(|(index, constant)| {
            let value = match constant {
                Constant::Bool(on) => Value::Bool(*on),
                Constant::U16(number) => Value::U16(*number),
            };
            (usize::from(*index), value)
        });
        let refuse = |error: &dyn std::fmt::Display| {
            Error::argument(
                OP,
                "kernels",
                format!("a pipeline of {}", launch.kernel),
                error.to_string(),
            )
        };
        let function = self
            .library
            .get_function(&launch.kernel, Some(&ConstantValues::new(constants.collect())))
            .map_err(|error| refuse(&error))?;
        let pipeline = device
            .new_compute_pipeline_state_with_function(&function)
            .map_err(|error| refuse(&error))?;
        let (threads, most) = (
            launch.threads.iter().product::<usize>(),
            pipeline.max_total_threads_per_threadgroup().min(limits::THREADS),
        );
        if threads > most {
            return Err(refuse(&format!(
                "{threads} threads in a threadgroup, of which the device takes {most}"
            )));
        }
        let mut ready = self.ready.write().unwrap_or_else(PoisonError::into_inner);
        ready.insert(key, pipeline.clone());
        Ok(pipeline)
    }
}
