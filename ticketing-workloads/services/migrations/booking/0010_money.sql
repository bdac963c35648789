-- Payments in two steps: an object is made at the provider, its id is written down, and only then it is confirmed. `number`
-- is part of the keys of an attempt; a definite "not charged" is followed by the next number.
--
-- One row for each provider, as before: a pod of the version before takes a state that it does not know for one in doubt,
-- searches for the charge, and can change nothing, for it writes only over 'Begun' and 'NotCharged'. The new states have other
-- names than those.
--
-- What is here needs its tables for a moment only: nothing is read through. Checks are validated, and indexes of tables that are
-- there are built, by steps of their own, which may wait for as long as they take.
ALTER TABLE payment_attempts
    DROP CONSTRAINT payment_attempts_state_check,
    ADD CONSTRAINT payment_attempts_state_check CHECK (state IN
        ('Begun', 'Creating', 'Created', 'Confirming', 'Reconfirming', 'NeedsBuyer', 'Charged', 'NotCharged', 'Uncharged',
         'Declined', 'Expired', 'Refused')) NOT VALID,
    ADD COLUMN number    integer NOT NULL DEFAULT 1,
    ADD COLUMN object_id text,
    ADD COLUMN reason    text,
    -- Since when the buyer is waited for, however often it is tried meanwhile.
    ADD COLUMN waits_since timestamptz,
    ADD CONSTRAINT payment_attempts_object_check CHECK
        (state NOT IN ('Created', 'Confirming', 'Reconfirming', 'NeedsBuyer') OR object_id IS NOT NULL) NOT VALID;

-- A closed payment is never begun again: its booking is given up.
ALTER TABLE payments ADD COLUMN closed_at timestamptz;

-- Money to give back, worked off by payment. One row for each charge.
CREATE TABLE refunds (
    key        text NOT NULL,
    provider   text NOT NULL,
    charge_id  text NOT NULL,
    reason     text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    next_at    timestamptz NOT NULL DEFAULT now(),
    tries      integer NOT NULL DEFAULT 0,
    last_error text,
    refund_id  text,
    done_at    timestamptz,
    PRIMARY KEY (provider, charge_id)
);
CREATE INDEX refunds_open ON refunds (next_at) WHERE done_at IS NULL;
CREATE INDEX refunds_by_key ON refunds (key);

-- Events that providers sent, each once; worked off by payment, which reads the object itself.
CREATE TABLE webhook_events (
    provider    text NOT NULL,
    event_id    text NOT NULL,
    object_id   text NOT NULL,
    received_at timestamptz NOT NULL DEFAULT now(),
    next_at     timestamptz NOT NULL DEFAULT now(),
    tries       integer NOT NULL DEFAULT 0,
    done_at     timestamptz,
    PRIMARY KEY (provider, event_id)
);
CREATE INDEX webhook_events_open ON webhook_events (next_at) WHERE done_at IS NULL;
CREATE INDEX webhook_events_done ON webhook_events (done_at) WHERE done_at IS NOT NULL;

-- Since when a booking waits for its payment.
ALTER TABLE bookings ADD COLUMN pending_since timestamptz;
ALTER TABLE bookings ALTER COLUMN pending_since SET DEFAULT now();

ALTER TABLE outbox
    DROP CONSTRAINT outbox_kind_check,
    ADD CONSTRAINT outbox_kind_check CHECK (kind IN ('BookingConfirmed', 'Ticket', 'BookingCancelled')) NOT VALID;
