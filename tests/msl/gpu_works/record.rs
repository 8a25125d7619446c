//! From an op to what is written of it.

use super::Stored;
use candle_core::{DType, Tensor};
use candle_mmfp4::cpu::Expert;
use candle_mmfp4::metal::host::{Host, RecordedOperand};
use candle_mmfp4::metal::moe::Stack;
use candle_mmfp4::metal::plan::{Binding, Constant, Launch};
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// An op that is to be recorded.
pub struct Op {
    /// What it is for.
    pub name: String,
    /// Which function of `references.py` says what it gives.
    pub op: &'static str,
    /// Of activations and, where nothing else is said, of outputs.
    pub dtype: DType,
    /// Rows of activations.
    pub m: usize,
    /// What else its reference has to know.
    pub meta: Map<String, Value>,
    /// Of its plan's operands, in order; those behind are scratch.
    pub roles: Vec<String>,
    /// Of experts, the table of where they are: it matters what is in it.
    pub places: Vec<u8>,
}

impl Op {
    pub fn new(name: &str, op: &'static str, dtype: DType, m: usize) -> Self {
        Self {
            name: name.into(),
            op,
            dtype,
            m,
            meta: Map::new(),
            roles: Vec::new(),
            places: Vec::new(),
        }
    }

    pub fn roles(mut self, roles: &[&str]) -> Self {
        self.roles.extend(roles.iter().map(ToString::to_string));
        self
    }

    /// With `count` weights that are stored so.
    pub fn weights(mut self, stored: Stored, count: usize) -> Self {
        self.name = format!("{}, {}", self.name, stored.name());
        self.meta.extend(stored.meta());
        self.roles.extend((0..count).flat_map(|i| stored.roles(i)));
        self
    }

    pub fn meta(mut self, meta: Value) -> Self {
        let Value::Object(fields) = meta else {
            unreachable!("an object")
        };
        self.meta.extend(fields);
        self
    }

    /// With the table that these experts have.
    pub fn places(mut self, routed: &[Expert], shared: &[Expert]) -> Self {
        let stack = Stack::of(routed, shared)
            .unwrap()
            .expect("experts that kernels take");
        self.places = stack.bytes()[2].to_vec();
        self
    }

    /// With an input that lies in a larger tensor.
    pub fn lies(self, role: &str, tensor: &Tensor) -> Self {
        let (layout, name) = (tensor.layout(), format!("lies.{role}"));
        self.meta(json!({name: [layout.dims(), layout.stride(), layout.start_offset()]}))
    }

    /// Its launches and operands.
    pub fn record<T>(self, forward: impl FnOnce() -> candle_core::Result<T>) -> Value {
        // Where tokens lie matters, and is in an operand; of the others only the size does.
        let host = Arc::new(Host::recorder(self.roles.iter().any(|role| role == "index")));
        host.install(forward).unwrap();
        let [recorded] = host.recorded().try_into().expect("one plan");
        let name = format!("{}, {}, {}", self.name, self.dtype.as_str(), self.m);
        assert!(recorded.operands.len() >= self.roles.len(), "{name}: operands");
        let mut operands = Vec::new();
        for (index, operand) in recorded.operands.iter().enumerate() {
            let role = self.roles.get(index).map_or("scratch", String::as_str);
            let is_output = role.starts_with('y') || role == "scratch";
            assert_eq!(operand.written, is_output, "{name}: operand {index}, {role}");
            operands.push(self.described(role, operand));
        }
        let mut meta = self.meta;
        meta.insert("m".into(), self.m.into());
        meta.insert("dtype".into(), self.dtype.as_str().into());
        let launches = &recorded.plan.launches;
        json!({
            "name": name,
            "op": self.op,
            "timed": !launches.iter().any(|launch| launch.kernel.contains("tiles")),
            "operands": operands,
            "launches": launches.iter().map(launch).collect::<Vec<_>>(),
            "meta": meta,
        })
    }

    fn described(&self, role: &str, operand: &RecordedOperand) -> Value {
        let part = role.split('.').next();
        let mut described = json!({
            "role": role,
            "len": operand.len,
            "weight": part.is_some_and(|part| ["codes", "scales", "w"].contains(&part)),
        });
        if role == "index" {
            described["contents"] = hex(&operand.bytes).into();
        }
        if role == "places" {
            assert_eq!(operand.len, self.places.len(), "{}: the table", self.name);
            described["contents"] = hex(&self.places).into();
        }
        described
    }
}

fn launch(launch: &Launch) -> Value {
    let constants = launch.constants.iter().map(|(index, constant)| match constant {
        Constant::Bool(on) => json!([index, u16::from(*on)]),
        Constant::U16(value) => json!([index, value]),
    });
    let bindings = launch.bindings.iter().map(|(index, binding)| match binding {
        Binding::Read { operand, offset } | Binding::Write { operand, offset } => {
            json!([index, {"operand": operand, "offset": offset}])
        }
        Binding::Bytes(bytes) => json!([index, {"bytes": hex(bytes)}]),
    });
    let work = launch.work;
    json!({
        "kernel": launch.kernel,
        "constants": constants.collect::<Vec<_>>(),
        "grid": launch.threadgroups,
        "threads": launch.threads,
        "bindings": bindings.collect::<Vec<_>>(),
        "weights": work.weights,
        "bytes": work.weights + work.read + work.written,
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
