(** Hoeffding's lemma, the scalar part

    For a random variable with values in [a, b] and mean m the lemma says
    ln E exp(X) <= m + (b - a)^2 / 8.  This file holds its two scalar steps, used by
    kl_bound.v:
      - exp lies below its chord on [a, b];
      - ln(1 - θ + θ exp(h)) <= θ h + h^2 / 8  for 0 <= θ <= 1 and h >= 0.

    Setting.  Standard library reals, derivatives from Coquelicot. *)
From Coq Require Import Reals Psatz.
From Coquelicot Require Import Coquelicot.
From Equiv Require Import calculus.
Local Open Scope R_scope.

(** exp(y) >= exp(x) (1 + y - x): exp lies above its tangents. *)
Lemma exp_above_tangent x y : exp x * (1 + (y - x)) <= exp y.
Proof.
replace (exp y) with (exp x * exp (y - x)) by (rewrite <- exp_plus; f_equal; ring).
apply Rmult_le_compat_l; [apply Rlt_le, exp_pos|apply exp_ineq1_le].
Qed.

(** exp(x) (b - a) <= (b - x) exp(a) + (x - a) exp(b) for a <= x <= b. *)
Lemma exp_below_chord a b x : a <= x <= b ->
  exp x * (b - a) <= (b - x) * exp a + (x - a) * exp b.
Proof.
intros X; pose proof (exp_above_tangent x a); pose proof (exp_above_tangent x b).
assert ((b - x) * (exp x * (1 + (a - x))) <= (b - x) * exp a).
  apply Rmult_le_compat_l; lra.
assert ((x - a) * (exp x * (1 + (b - x))) <= (x - a) * exp b).
  apply Rmult_le_compat_l; lra.
nra.
Qed.

(** 1 - θ + θ exp(h) > 0 for 0 <= θ <= 1. *)
Lemma two_point_pos th h : 0 <= th <= 1 -> 0 < 1 - th + th * exp h.
Proof.
intros T; pose proof (exp_pos h); destruct (Req_dec th 0) as [->|N]; [lra|].
assert (0 < th * exp h) by (apply Rmult_lt_0_compat; lra); lra.
Qed.

(** ln(1 - θ + θ exp(h)) <= θ h + h^2 / 8 *)
Lemma two_point th h : 0 <= th <= 1 -> 0 <= h ->
  ln (1 - th + th * exp h) <= th * h + h ^ 2 / 8.
Proof.
intros T h0.
set (s := fun x => th * exp x / (1 - th + th * exp x)).
cut (0 <= h ^ 2 / 8 + th * h - ln (1 - th + th * exp h)); [lra|].
apply (second_order_ge0 (fun x => x ^ 2 / 8 + th * x - ln (1 - th + th * exp x))
  (fun x => x / 4 + th - s x) (fun x => 1 / 4 - s x * (1 - s x))); auto.
- rewrite exp_0; replace (1 - th + th * 1) with 1 by ring; rewrite ln_1; field.
- unfold s; rewrite exp_0; field; lra.
- intros x _; pose proof (two_point_pos th x T); unfold s.
  auto_derive; [lra|field; lra].
- intros x _; pose proof (two_point_pos th x T); unfold s.
  auto_derive; [lra|field; lra].
- intros x _; pose proof (pow2_ge_0 (s x - 1 / 2)); lra.
Qed.

(** If 0 < E <= the chord of exp at m, then ln E <= m + (b - a)^2 / 8. *)
Lemma hoeffding a b m E : a < b -> a <= m <= b -> 0 < E ->
  E * (b - a) <= (b - m) * exp a + (m - a) * exp b ->
  ln E <= m + (b - a) ^ 2 / 8.
Proof.
intros ab M E0 C; set (h := b - a); set (th := (m - a) / h).
assert (h0 : 0 < h) by (unfold h; lra).
assert (T : 0 <= th <= 1).
  unfold th; split; [apply Rdiv_le_0_compat; lra|].
  apply Rmult_le_reg_r with h; [lra|]; unfold Rdiv; rewrite Rmult_assoc, Rinv_l; unfold h; lra.
assert (P := two_point_pos th h T).
assert (L : E <= exp a * (1 - th + th * exp h)).
  apply Rmult_le_reg_r with h; [lra|].
  replace (exp a * (1 - th + th * exp h) * h)
    with ((b - m) * exp a + (m - a) * (exp a * exp h)).
    rewrite <- exp_plus; replace (a + h) with b by (unfold h; ring); exact C.
  unfold th, h; field; lra.
apply Rle_trans with (ln (exp a * (1 - th + th * exp h))).
  destruct L as [L| ->]; [left; apply ln_increasing; auto|lra].
rewrite ln_mult, ln_exp; auto using exp_pos.
pose proof (two_point th h T (Rlt_le _ _ h0)).
replace (th * h) with (m - a) in H by (unfold th; field; lra).
lra.
Qed.
