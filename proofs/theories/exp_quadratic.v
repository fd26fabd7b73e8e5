(** exp and ln near 0, to second order with relative error bounds

    For |x| <= c <= 1,
      1 + x + (1 - c/3) x^2 / 2  <=  exp(x)  <=  1 + x + (1 + c) x^2 / 2 ,
    and for 0 <= V <= c^2 a number E between 1 + (1 - c/3) V/2 and 1 + (1 + c) V/2 has
      (1 - c) V/2  <=  ln(E)  <=  (1 + c) V/2 .
    For use in kl_quadratic.v.

    Setting.  Standard library reals, derivatives from Coquelicot. *)
From Coq Require Import Reals Psatz.
From Coquelicot Require Import Coquelicot.
From Equiv Require Import calculus.
Local Open Scope R_scope.

(** exp(b) >= 1 + b + b^2/2 for b >= 0. *)
Lemma exp_above_parabola b : 0 <= b -> 1 + b + b ^ 2 / 2 <= exp b.
Proof.
intros b0; cut (0 <= exp b - (1 + b + b ^ 2 / 2)); [lra|].
apply (second_order_ge0 (fun x => exp x - (1 + x + x ^ 2 / 2))
  (fun x => exp x - (1 + x)) (fun x => exp x - 1)); auto.
- rewrite exp_0; lra.
- rewrite exp_0; lra.
- intros x _; auto_derive; [auto|lra].
- intros x _; auto_derive; [auto|lra].
- intros x X; pose proof (exp_ineq1_le x); lra.
Qed.

(** exp(-b) >= 1 - b + b^2/2 - b^3/6 for b >= 0. *)
Lemma exp_above_cubic b : 0 <= b -> 1 - b + b ^ 2 / 2 - b ^ 3 / 6 <= exp (- b).
Proof.
intros b0; cut (0 <= exp (- b) - (1 - b + b ^ 2 / 2 - b ^ 3 / 6)); [lra|].
apply (second_order_ge0 (fun x => exp (- x) - (1 - x + x ^ 2 / 2 - x ^ 3 / 6))
  (fun x => - exp (- x) - (- 1 + x - x ^ 2 / 2)) (fun x => exp (- x) - (1 - x))); auto.
- rewrite Ropp_0, exp_0; lra.
- rewrite Ropp_0, exp_0; lra.
- intros x _; auto_derive; [auto|lra].
- intros x _; auto_derive; [auto|lra].
- intros x _; pose proof (exp_ineq1_le (- x)); lra.
Qed.

(** exp(b) <= 1 + b + b^2/2 + b^3/2 for 0 <= b <= 1. *)
Lemma exp_below_cubic b : 0 <= b <= 1 -> exp b <= 1 + b + b ^ 2 / 2 + b ^ 3 / 2.
Proof.
intros [b0 b1]; cut (0 <= 1 + b + b ^ 2 / 2 + b ^ 3 / 2 - exp b); [lra|].
apply (third_order_ge0 (fun x => 1 + x + x ^ 2 / 2 + x ^ 3 / 2 - exp x)
  (fun x => 1 + x + 3 / 2 * x ^ 2 - exp x) (fun x => 1 + 3 * x - exp x)
  (fun x => 3 - exp x)); auto.
- rewrite exp_0; lra.
- rewrite exp_0; lra.
- rewrite exp_0; lra.
- intros x _; auto_derive; [auto|lra].
- intros x _; auto_derive; [auto|lra].
- intros x _; auto_derive; [auto|lra].
- intros x X; pose proof exp_le_3.
  destruct (Req_dec x 1) as [->|N]; [lra|].
  assert (exp x < exp 1) by (apply exp_increasing; lra); lra.
Qed.

(** exp(-b) <= 1 - b + b^2/2 for b >= 0. *)
Lemma exp_below_parabola b : 0 <= b -> exp (- b) <= 1 - b + b ^ 2 / 2.
Proof.
intros b0; cut (0 <= 1 - b + b ^ 2 / 2 - exp (- b)); [lra|].
apply (second_order_ge0 (fun x => 1 - x + x ^ 2 / 2 - exp (- x))
  (fun x => - 1 + x + exp (- x)) (fun x => 1 - exp (- x))); auto.
- rewrite Ropp_0, exp_0; lra.
- rewrite Ropp_0, exp_0; lra.
- intros x _; auto_derive; [auto|lra].
- intros x _; auto_derive; [auto|lra].
- intros x X; destruct (Req_dec x 0) as [->|N]; [rewrite Ropp_0, exp_0; lra|].
  assert (exp (- x) < exp 0) by (apply exp_increasing; lra).
  rewrite exp_0 in *; lra.
Qed.

(** 1 + x + (1 - c/3)/2 x^2 <= exp(x) <= 1 + x + (1 + c)/2 x^2 for |x| <= c <= 1. *)
Lemma exp_quadratic x c : Rabs x <= c -> c <= 1 ->
  1 + x + (1 - c / 3) / 2 * (x * x) <= exp x <= 1 + x + (1 + c) / 2 * (x * x).
Proof.
intros X c1; apply Rabs_le_between in X.
assert (0 <= x * x) by apply Rle_0_sqr.
destruct (Rle_dec 0 x) as [x0|x0].
- pose proof (exp_above_parabola x x0).
  assert (B : 0 <= x <= 1) by lra; pose proof (exp_below_cubic x B).
  assert (0 <= (c - x) * (x * x)) by (apply Rmult_le_pos; lra).
  assert (0 <= c * (x * x)) by (apply Rmult_le_pos; lra).
  split; lra.
- assert (B : 0 <= - x) by lra.
  pose proof (exp_above_cubic (- x) B) as L; pose proof (exp_below_parabola (- x) B) as U.
  rewrite Ropp_involutive in L, U.
  assert (0 <= (c + x) * (x * x)) by (apply Rmult_le_pos; lra).
  assert (0 <= c * (x * x)) by (apply Rmult_le_pos; lra).
  split; lra.
Qed.

(** (1 - c) V/2 <= ln E <= (1 + c) V/2 for E between the two parabolas, V <= c^2. *)
Lemma ln_quadratic V c E : 0 <= c <= 1 -> 0 <= V <= c * c ->
  1 + (1 - c / 3) / 2 * V <= E <= 1 + (1 + c) / 2 * V ->
  V / 2 * (1 - c) <= ln E <= V / 2 * (1 + c).
Proof.
intros C [V0 Vc] [L U]; set (y := (1 - c / 3) / 2 * V) in *.
assert (y0 : 0 <= y) by (apply Rmult_le_pos; lra).
assert (cV : 0 <= c * V) by (apply Rmult_le_pos; lra).
assert (yV : y <= V / 2) by (unfold y; lra).
assert (Vc1 : V <= c) by nra.
split.
- apply Rle_trans with (ln (1 + y)).
    apply Rle_trans with (1 - / (1 + y)).
      replace (1 - / (1 + y)) with (y * / (1 + y)) by (field; lra).
      assert (I : 1 - y <= / (1 + y)).
        apply Rmult_le_reg_r with (1 + y); [lra|]; rewrite Rinv_l by lra; nra.
      assert (y * (1 - y) <= y * / (1 + y)) by (apply Rmult_le_compat_l; lra).
      assert (y * y <= y * (c / 2)) by (apply Rmult_le_compat_l; lra).
      assert (y * (c / 2) <= V / 2 * (c / 2)) by (apply Rmult_le_compat_r; lra).
      unfold y in *; lra.
    assert (P : 0 < / (1 + y)) by (apply Rinv_0_lt_compat; lra).
    pose proof (exp_ineq1_le (ln (/ (1 + y)))) as T.
    rewrite exp_ln in T by exact P; rewrite ln_Rinv in T by lra; lra.
  destruct L as [L| <-]; [left; apply ln_increasing; lra|lra].
- pose proof (exp_ineq1_le (ln E)) as T; rewrite exp_ln in T by lra; lra.
Qed.
