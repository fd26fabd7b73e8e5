(** The remainder of a gated MLP is of second order, with an explicit constant

    Claim.  Suppose the activation has a quadratic remainder,

      |φ(a + e) - φ(a) - φ'(a) e| <= K e^2     for all a, e.

    Then for an update of size t (that is t dW_g, t dW_u, t dW_d) with |t| <= 1,
    in every coordinate of the output,

      |y_tuned - (y + t shift)| <= t^2 C,
      C   = |W_d| c + |dW_d| (|dm| + c),
      c_j = |φ'(a_g) e_g e_u|_j + K (e_g)_j^2 (|a_u|_j + |e_u|_j),

    where |M| takes absolute values entry by entry.  A steer t v at mlp_in obeys
    the same with dW_d = 0.

    Assumptions.  Only the displayed property of φ; silu_quadratic.v proves it
    for SiLU with K = 1/4.  ReLU does not have it.

    Not said here.  The bound is local (the input u is the same before and after)
    and no claim is made that it is tight. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Equiv Require Import basics glu_expansion.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

Section Bound.
Variables (R : realFieldType) (d n o : nat) (phi phi' : R -> R) (K : R).

(** The only property of the activation that is used. *)
Hypothesis act_rem_le : forall a e, `|act_rem phi phi' a e| <= K * e ^+ 2.

(** Entrywise absolute value. *)
Definition absm p q (M : 'M[R]_(p, q)) : 'M[R]_(p, q) := map_mx (fun x => `|x|) M.

(** |x| <= y entrywise gives |M x| <= |M| y entrywise. *)
Lemma abs_mulmx p q (M : 'M[R]_(p, q)) (x y : 'cV_q) i :
  (forall j, `|x j 0| <= y j 0) -> `|(M *m x) i 0| <= (absm M *m y) i 0.
Proof.
move=> xy; rewrite !mxE (le_trans (ler_norm_sum _ _ _)) // ler_sum // => j _.
by rewrite !mxE normrM le_mul2l.
Qed.

(** The constant c of the gate. *)
Definition gate_const (ag au eg eu : 'cV[R]_n) : 'cV[R]_n :=
  \col_j (`|phi' (ag j 0) * eg j 0 * eu j 0|
           + K * eg j 0 ^+ 2 * (`|au j 0| + `|eu j 0|)).

(** c >= 0 *)
Lemma gate_const_ge0 ag au eg eu j : 0 <= gate_const ag au eg eu j 0.
Proof.
have K0 : 0 <= K.
  by have := le_trans (normr_ge0 _) (act_rem_le 0 1); rewrite expr1n mulr1.
by rewrite mxE addr_ge0 // mulr_ge0 ?addr_ge0 // mulr_ge0 // sqr_ge0.
Qed.

(** |r(t e_g, t e_u)| <= t^2 c for |t| <= 1. *)
Lemma gate_rem_le ag au eg eu t j : `|t| <= 1 ->
  `|gate_rem phi phi' ag au (t *: eg) (t *: eu) j 0|
    <= t ^+ 2 * gate_const ag au eg eu j 0.
Proof.
move=> t1; rewrite !mxE; apply: le_trans (le_normD _ _) _.
rewrite [X in _ <= X]mulrDr le_add //.
  by rewrite (mulrCA (phi' _) t) mulrACA -expr2 normrM ger0_norm ?sqr_ge0.
rewrite normrM; apply: le_trans (_ : K * (t * eg j 0) ^+ 2
    * (`|au j 0| + `|eu j 0|) <= _).
  apply: le_mul => //; apply: le_trans (le_normD _ _) _.
  by rewrite le_add2l normrM le_shrink.
by rewrite exprMn mulrCA !mulrA.
Qed.

Variables (Wg Wu dWg dWu : 'M[R]_(n, d)) (Wd dWd : 'M[R]_(o, n)) (u : 'cV[R]_d).

(** C = |W_d| c + |dW_d| (|dm| + c). *)
Definition update_const : 'cV[R]_o :=
  let c := gate_const (Wg *m u) (Wu *m u) (dWg *m u) (dWu *m u) in
  let dm := dgate phi phi' (Wg *m u) (Wu *m u) (dWg *m u) (dWu *m u) in
  absm Wd *m c + absm dWd *m (absm dm + c).

(** |remainder(t dW)| <= t^2 C for |t| <= 1. *)
Lemma rem_update_le t i : `|t| <= 1 ->
  `|rem_update phi phi' Wg Wu Wd (t *: dWg) (t *: dWu) (t *: dWd) u i 0|
    <= t ^+ 2 * update_const i 0.
Proof.
move=> t1; rewrite /rem_update -!scalemxAl.
set r := gate_rem _ _ _ _ _ _; set dm := dgate _ _ _ _ (t *: _) _.
rewrite mxE (le_trans (le_normD _ _)) // /update_const.
set c := gate_const _ _ _ _; set dm1 := dgate _ _ _ _ _ _.
have rC j : `|r j 0| <= (t ^+ 2 *: c) j 0.
  by rewrite [X in _ <= X]mxE; exact: gate_rem_le.
rewrite [X in _ * X]mxE mulrDr le_add //.
  have := abs_mulmx Wd i rC.
  by rewrite -scalemxAr [X in _ <= X]mxE.
have -> : dm = t *: dm1.
  by apply/colP=> j; rewrite !mxE mulrDr !(mulrCA _ t).
have dmC j : `|(t *: dm1 + r) j 0| <= (`|t| *: (absm dm1 + c)) j 0.
  rewrite mxE; apply: le_trans (le_normD _ _) _.
  rewrite mxE [X in _ <= X]mxE [X in _ <= _ * X]mxE mulrDr le_add //.
    by rewrite normrM [X in _ <= _ * X]mxE.
  apply: le_trans (rC j) _; rewrite mxE -real_normK ?num_real // expr2.
  by rewrite -mulrA le_mul2l // le_shrink // gate_const_ge0.
rewrite mxE normrM -real_normK ?num_real // expr2 -mulrA.
apply: le_mul2l => //; have := abs_mulmx dWd i dmC.
by rewrite -scalemxAr [X in _ <= X]mxE.
Qed.

(** shift(t dW) = t shift(dW): the shift is linear in the update. *)
Lemma shift_updateZ t :
  shift_update phi phi' Wg Wu Wd (t *: dWg) (t *: dWu) (t *: dWd) u
    = t *: shift_update phi phi' Wg Wu Wd dWg dWu dWd u.
Proof.
rewrite /shift_update -!scalemxAl scalerDr; congr (_ + _); rewrite [RHS]scalemxAr.
by congr (_ *m _); apply/colP=> j; rewrite !mxE mulrDr !(mulrCA _ t).
Qed.

(** |y_tuned - (y + t shift)| <= t^2 C for |t| <= 1. *)
Theorem glu_first_order t i : `|t| <= 1 ->
  `|(glu phi (Wg + t *: dWg) (Wu + t *: dWu) (Wd + t *: dWd) u
     - (glu phi Wg Wu Wd u
        + t *: shift_update phi phi' Wg Wu Wd dWg dWu dWd u)) i 0|
    <= t ^+ 2 * update_const i 0.
Proof.
by rewrite (glu_expansion _ phi') shift_updateZ addrC addKr; exact: rem_update_le.
Qed.

(** The constant of a steer v: |W_d| c with e_g = W_g v, e_u = W_u v. *)
Definition mlp_in_const (v : 'cV[R]_d) : 'cV[R]_o :=
  absm Wd *m gate_const (Wg *m u) (Wu *m u) (Wg *m v) (Wu *m v).

(** |y(u + t v) - (y(u) + t shift)| <= t^2 C for |t| <= 1. *)
Theorem glu_first_order_mlp_in v t i : `|t| <= 1 ->
  `|(glu phi Wg Wu Wd (u + t *: v)
     - (glu phi Wg Wu Wd u + t *: shift_mlp_in phi phi' Wg Wu Wd u v)) i 0|
    <= t ^+ 2 * mlp_in_const v i 0.
Proof.
move=> t1; rewrite (glu_expansion_mlp_in _ phi') !shift_mlp_inE -scalemxAr.
rewrite addrC addKr /rem_mlp_in -!scalemxAr /mlp_in_const.
set c := gate_const _ _ _ _; set r := gate_rem _ _ _ _ _ _.
have rC j : `|r j 0| <= (t ^+ 2 *: c) j 0.
  by rewrite [X in _ <= X]mxE; exact: gate_rem_le.
by have := abs_mulmx Wd i rC; rewrite -scalemxAr [X in _ <= X]mxE.
Qed.
End Bound.
