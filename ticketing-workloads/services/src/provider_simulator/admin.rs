//! Where tests and drills say how the providers behave, and see what they have charged.
//!
//! `GET /providers`, `PUT /providers/{name}` with a [`Behaviour`] (`{}`: behave), `GET /charges`, and
//! `PUT /buyers/{key}`: the buyer of that order does what a provider asks for.

use super::provider::{Behaviour, Provider};
use crate::answers::{not_found, problem};
use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, put};
use axum::{Json, Router};
use serde_json::{Value, json};
use std::sync::Arc;

type Providers = [Arc<Provider>; 2];

pub fn router(providers: Providers) -> Router {
    Router::new()
        .route("/livez", get(|| async { "ok" }))
        .route("/readyz", get(|| async { "ok" }))
        .route("/providers", get(list))
        .route("/providers/{name}", put(behave))
        .route("/charges", get(charges))
        .route("/buyers/{key}", put(buyer_acts))
        .fallback(not_found)
        .with_state(providers)
}

async fn list(State(providers): State<Providers>) -> Json<Value> {
    let one = |provider: &Arc<Provider>| {
        let (behaviour, requests, charges) = provider.state();
        let state = json!({"behaviour": behaviour, "requests": requests, "charges": charges});
        (provider.name.to_owned(), state)
    };
    Json(Value::Object(providers.iter().map(one).collect()))
}

async fn behave(State(providers): State<Providers>, Path(name): Path<String>, body: Bytes) -> Response {
    let Some(provider) = providers.iter().find(|provider| provider.name == name) else {
        return problem(StatusCode::NOT_FOUND, "NO_SUCH_PROVIDER", "there are stripe and paypal");
    };
    match serde_json::from_slice::<Behaviour>(&body) {
        Ok(behaviour) => {
            provider.behave(behaviour.clone());
            Json(behaviour).into_response()
        }
        Err(error) => problem(StatusCode::BAD_REQUEST, "INVALID_REQUEST", &error.to_string()),
    }
}

async fn buyer_acts(State(providers): State<Providers>, Path(key): Path<String>) -> StatusCode {
    for provider in &providers {
        provider.buyer_acts(&key);
    }
    StatusCode::NO_CONTENT
}

/// All charges of both: a key that is there twice was charged twice.
async fn charges(State(providers): State<Providers>) -> Json<Value> {
    let of = |provider: &Arc<Provider>| {
        let name = provider.name;
        provider.charges().into_iter().map(move |charge| {
            let mut charge = json!(charge);
            charge["provider"] = json!(name);
            charge
        })
    };
    Json(json!({"charges": providers.iter().flat_map(of).collect::<Vec<_>>()}))
}
